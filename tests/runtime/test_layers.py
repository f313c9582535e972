"""Layers and combinators: gradients against finite differences in float64, and the promises of the three passes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hpcpipe import model
from hpcpipe.backends.backend import open_backend
from hpcpipe.backends.null import halved, record, together
from hpcpipe.config import ModelConfig, UserError
from hpcpipe.layers.attention import Attention
from hpcpipe.layers.combinators import Chain, Recompute, Residual
from hpcpipe.layers.dropout import Dropout
from hpcpipe.layers.embedding import Embedding
from hpcpipe.layers.linear import Linear
from hpcpipe.layers.loss import LinearCrossEntropy
from hpcpipe.layers.mlp import gelu_mlp, swiglu_mlp
from hpcpipe.layers.norm import LayerNorm, RMSNorm
from tests.harness import Rig, check_gradients, touched

# Two sequences of five tokens.
T, N = 5, 10
LAYERS = {
    "linear": (Linear(7, 3), 7),
    "linear, bias": (Linear(6, 9, bias=True), 6),
    "layernorm": (LayerNorm(7), 7),
    "rmsnorm": (RMSNorm(7), 7),
    "attention": (Attention(6, 3, 3, T), 6),
    "attention, one head, bias": (Attention(5, 1, 1, T, bias=True), 5),
    "attention, grouped, rope": (Attention(8, 4, 2, T, theta=10000.0), 8),
    "attention, one key head, rope, bias": (Attention(12, 3, 1, T, theta=100.0, bias=True), 12),
    "gelu_mlp": (gelu_mlp(5, 11), 5),
    "swiglu_mlp": (swiglu_mlp(5, 7), 5),
    "residual": (Residual(Chain(norm=RMSNorm(6), mlp=swiglu_mlp(6, 5))), 6),
    "recompute": (Recompute(Residual(Chain(norm=LayerNorm(6), mlp=gelu_mlp(6, 5)))), 6),
    "recomputed attention": (Recompute(Attention(8, 4, 2, T, theta=10000.0)), 8),
    "dropout": (Dropout(Linear(6, 5, bias=True), 0.4, salt=3), 6),
}
HEAD = "linearcrossentropy_fwd"
KEY = {"key": np.array([7, 3, 11, 1])}


def rig_of(name: str, seed: int = 0) -> Rig:
    layer, width = LAYERS[name]
    rig = Rig(layer, (N, width), seed=seed)
    return rig.fill({k: v for k, v in KEY.items() if k in rig.recording.inputs})


@pytest.mark.parametrize("name", LAYERS)
def test_gradients(name: str) -> None:
    check_gradients(rig_of(name))


@pytest.mark.parametrize("name", LAYERS)
def test_grad_weight_accumulates(name: str) -> None:
    rig = rig_of(name).clear().run("F", "B", "W")
    once = {k: rig.grad(k).copy() for k in rig.recording.grads}
    rig.run("W")
    assert once
    for k, value in once.items():
        assert np.any(value)
        np.testing.assert_array_equal(rig.grad(k), 2 * value)


@pytest.mark.parametrize("name", LAYERS)
def test_the_passes_leave_alone_what_they_are_given(name: str) -> None:
    rig = rig_of(name)
    before = {k: rig[k].copy() for k in ("x", "dy", *rig.recording.params)}
    rig.run("F", "B", "W")
    for k, value in before.items():
        np.testing.assert_array_equal(rig[k], value, err_msg=k)


@pytest.mark.parametrize("name", LAYERS)
def test_w_needs_only_what_is_owed(name: str) -> None:
    """After B, everything that W does not name may be overwritten; W writes nothing but gradients."""
    rig = rig_of(name).clear().run("F", "B", "W")
    expected = {k: rig.grad(k).copy() for k in rig.recording.grads}
    rig.clear().run("F", "B")
    needed = touched(rig.recording, "W")
    calls = [c for p in "FBW" for c in rig.recording.passes[p]]
    for tensor in {t for c in calls for t in c.buffers if t is not None and t.id not in needed and t.type == "r"}:
        rig[tensor][...] = np.nan
    rig.run("W")
    for k, value in expected.items():
        np.testing.assert_array_equal(rig.grad(k), value)
    written = {t.id for c in rig.recording.passes["W"] for t, a in zip(c.buffers, c.row.buffers, strict=True)
               if t is not None and a.role != "in"}  # fmt: skip
    assert written == {t.id for t in rig.recording.grads.values()}
    assert not needed & {t.id for t in rig.recording.params.values()}


def test_b_touches_nothing_that_w_alone_needs() -> None:
    linear = record(Linear(4, 3, bias=True), (N, 4))
    assert linear.dx and linear.dy
    assert touched(linear, "B") == {linear.dx.id, linear.dy.id, linear.params["weight"].id}

    embedding = record(Embedding(9, 4, N, T, positions=6), None)
    assert touched(embedding, "B") == set() and embedding.dx is None

    # B of GELU needs the activation's input and makes its output again: nobody keeps what F made.
    mlp = record(gelu_mlp(4, 6), (N, 4))
    _, gelu, _ = mlp.passes["F"]
    output, entrance = gelu.buffers
    assert mlp.x and output and entrance
    assert {entrance.id} == touched(mlp, "B") & {entrance.id, output.id, mlp.x.id}
    assert {mlp.x.id} == touched(mlp, "W") & {entrance.id, output.id, mlp.x.id}


@pytest.mark.parametrize("name", ["residual", "attention, grouped, rope", "gelu_mlp", "dropout"])
def test_recompute_gives_the_same_bits_and_saves_only_x(name: str) -> None:
    layer, width = LAYERS[name]
    plain, again = rig_of(name).clear().run(), Rig(Recompute(layer), (N, width))
    again.fill({k: v for k, v in KEY.items() if k in again.recording.inputs}).clear().run()
    np.testing.assert_array_equal(plain["y"], again["y"])
    np.testing.assert_array_equal(plain["dx"], again["dx"])
    for k in layer.params:
        np.testing.assert_array_equal(plain.grad(k), again.grad(k))
    r = again.recording
    assert r.x
    kept = {i for i, (born, _) in r.lifetimes.items() if born == "F"} & (touched(r, "B") | touched(r, "W"))
    assert kept <= {r.x.id} | {t.id for t in (*r.params.values(), *r.inputs.values())}


def test_chain_names_and_order() -> None:
    chain = Chain(Chain(norm=RMSNorm(4)), Linear(4, 6), mlp=swiglu_mlp(6, 5), **{"layer.0": Linear(6, 2)})
    expected = ["norm.weight", "weight", "mlp.gate_up.weight", "mlp.down.weight", "layer.0.weight"]
    assert list(chain.params) == expected
    assert [c.kernel for c in record(chain, (N, 4)).passes["F"]] == [
        "rmsnorm_fwd", "linear_fwd", "linear_fwd", "swiglu_fwd", "linear_fwd", "linear_fwd",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="a parameter called weight"):
        Chain(Linear(2, 2), Linear(2, 2))


def test_chain_is_the_composition_of_its_children() -> None:
    first, second = Linear(4, 6, bias=True), RMSNorm(6)
    whole = Rig(Chain(a=first, b=second), (N, 4)).clear()
    one, two = Rig(first, (N, 4)).clear(), Rig(second, (N, 6)).clear()
    one.fill({"weight": whole["a.weight"], "bias": whole["a.bias"], "x": whole["x"]}).run("F")
    two.fill({"weight": whole["b.weight"], "dy": whole["dy"], "x": one["y"]}).run("F", "B", "W")
    one.fill({"dy": two["dx"]}).run("B", "W")
    whole.run("F", "B", "W")
    np.testing.assert_array_equal(whole["y"], two["y"])
    np.testing.assert_array_equal(whole["dx"], one["dx"])
    np.testing.assert_array_equal(whole.grad("a.weight"), one.grad("weight"))
    np.testing.assert_array_equal(whole.grad("b.weight"), two.grad("weight"))


# --- what is done to a recording


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_two_paths_meet_in_the_kernel_that_ends_one_of_them(family: str) -> None:
    passes = record(model.chain(TINY[family], 2, T), None).passes
    norm = "layernorm_dx" if family == "gpt2" else "rmsnorm_dx"
    assert not [c for calls in passes.values() for c in calls if c.kernel == "add_fwd"]
    around = [[c.kernel for c in passes[name] if c.row.ins[-1].name == "z" and c.buffers[-1] is not None]
              for name in "FB"]  # fmt: skip
    assert around == [["linear_fwd", "linear_fwd"] * 2, [norm, norm] * 2]
    dropped = record(model.chain(replace(TINY[family], dropout=0.1), 2, T), None).passes
    assert [c.kernel for c in dropped["F"] if c.kernel == "add_fwd"] == ["add_fwd"] * 4  # its product is dropped first


def test_a_sum_that_is_read_elsewhere_stays() -> None:
    class Twice:
        params = Linear(4, 4).params

        def forward(self, ops: Any, p: Any, x: Any) -> tuple[Any, None]:
            y = ops.linear_fwd(x, p["weight"])
            return ops.add_fwd(ops.add_fwd(x, y), y), None

    recording = record(Twice(), (N, 4), backward=False)
    assert [c.kernel for c in recording.passes["F"]] == ["linear_fwd", "add_fwd", "add_fwd"]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_b_and_w_together_give_the_same_bits_and_owe_nothing(family: str) -> None:
    m = replace(TINY[family], dropout=0.2)
    apart = model_rig(m).clear().run()
    one = model_rig(m, together).clear().run("F", "B")
    np.testing.assert_array_equal(apart["y"], one["y"])
    for name in apart.recording.params:
        np.testing.assert_array_equal(apart.grad(name), one.grad(name))
    spans = set(one.recording.lifetimes.values())
    assert one.recording.passes["W"] == () and spans == {("F", "F"), ("F", "B"), ("B", "B")}
    assert one.recording.flops("B") == apart.recording.flops("B") + apart.recording.flops("W")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_halved_activations_take_half_the_room_and_cost_three_digits(family: str) -> None:
    m = replace(TINY[family], dropout=0.2)
    plain, half = model_rig(m).clear().run(), model_rig(m, halved).clear().run()
    np.testing.assert_allclose(half["y"], plain["y"], rtol=5e-3)
    for name in plain.recording.params:
        size = np.abs(plain.grad(name)).max()
        np.testing.assert_allclose(half.grad(name) / size, plain.grad(name) / size, atol=0.05)

    def waiting(rig: Rig) -> list[Any]:
        r = rig.recording
        spans = r.lifetimes
        every = {t.id: t for calls in r.passes.values() for c in calls for t in c.buffers if t is not None}
        given = {t.id for group in (r.params, r.grads, r.inputs) for t in group.values()}
        return [t for i, t in every.items() if spans[i][0] == "F" and spans[i][1] != "F" and i not in given]

    before, after = waiting(plain), waiting(half)
    wide = [t for t in before if t.type == "r" and t.shape[-1:] != (m.heads,) and len(t.shape) == 2]
    # what the loss hands to the norm before it is a gradient
    assert len([t for t in after if t.type == "h"]) == len(wide) - 1
    assert {t.type for t in after if len(t.shape) == 2 and t.shape[1] > m.heads and t.type != "h"} == {"r"}
    one = model_rig(m, lambda r: halved(together(r))).clear().run("F", "B")
    for name in half.recording.params:
        np.testing.assert_array_equal(one.grad(name), half.grad(name))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_computing_on_bfloat16_costs_two_digits_and_keeps_sums_and_masters_whole(family: str) -> None:
    m = replace(TINY[family], dropout=0.2)
    plain, half = model_rig(m).clear().run(), model_rig(m, compute="h").clear().run()
    r = half.recording
    np.testing.assert_allclose(half["y"], plain["y"], rtol=1e-2)
    for name in plain.recording.params:
        size = np.abs(plain.grad(name)).max()
        np.testing.assert_allclose(half.grad(name) / size, plain.grad(name) / size, atol=0.1)
    assert {t.type for group in (r.params, r.grads) for t in group.values()} == {"r"}
    read = {name for name, spec in half.layer.params.items() if len(spec.shape) == 2 or name.endswith(".bias")}
    norms = {name for name in read if "norm" in name}
    assert r.halves.keys() == read - norms
    calls = [c for calls in r.passes.values() for c in calls]
    kinds = {(a.type, t.type) for c in calls for a, t in zip(c.row.buffers, c.buffers, strict=True) if t is not None}
    assert ("a", "h") in kinds and not {("a", "r"), ("r", "h")} & kinds
    assert sum(c.nbytes for c in calls) < 0.75 * sum(c.nbytes for c in sum(plain.recording.passes.values(), ()))


# --- the ends of a model


def test_embedding_and_loss_gradients() -> None:
    rng = np.random.default_rng(2)
    inputs = {"ids": rng.integers(0, 9, N), "targets": rng.integers(0, 9, N)}
    check_gradients(Rig(Embedding(9, 4, N, T, positions=6)).fill({"ids": inputs["ids"]}))
    check_gradients(Rig(Embedding(9, 4, N, T)).fill({"ids": inputs["ids"]}))
    rig = Rig(LinearCrossEntropy(4, 9, scale=0.125), (N, 4)).fill({"targets": inputs["targets"]})
    check_gradients(rig, scale=0.125)


def test_a_repeated_token_gets_the_sum_of_its_gradients() -> None:
    rig = Rig(Embedding(5, 3, 4, 4)).fill({"ids": np.array([2, 0, 2, 2])}).clear().run("F", "B", "W")
    expected = np.zeros((5, 3))
    expected[0], expected[2] = rig["dy"][1], rig["dy"][[0, 2, 3]].sum(axis=0)
    np.testing.assert_allclose(rig.grad("weight"), expected, rtol=1e-14)


def test_loss_is_the_sum_of_the_negative_log_likelihoods() -> None:
    rig = Rig(LinearCrossEntropy(4, 9, scale=1.0), (N, 4))
    rig["targets"][...] = np.arange(N) % 9
    logits = rig["x"] @ rig["weight"].T
    likelihood = np.exp(logits)[np.arange(N), np.arange(N) % 9] / np.exp(logits).sum(axis=1)
    np.testing.assert_allclose(rig.run("F")["y"], [-np.log(likelihood).sum()], rtol=1e-13)


# --- dropout


def test_dropout_off_is_the_layer_itself() -> None:
    rig, plain = rig_of("dropout").clear(), Rig(LAYERS["dropout"][0].layer, (N, 6)).clear()
    rig["key"][3] = 0
    rig.run(), plain.run()
    np.testing.assert_array_equal(rig["y"], plain["y"])
    np.testing.assert_array_equal(rig["dx"], plain["dx"])


def test_dropout_depends_on_every_word_of_its_key_and_on_the_salt() -> None:
    def mask(salt: int, key: list[int]) -> tuple[bool, ...]:
        rig = Rig(Dropout(Linear(6, 40), 0.5, salt), (N, 6))
        rig["key"][...] = key
        return tuple((rig.run("F")["y"] != 0).ravel())

    first = mask(1, [0, 0, 0, 1])
    assert first == mask(1, [0, 0, 0, 1])
    others = [mask(2, [0, 0, 0, 1]), mask(1, [1, 0, 0, 1]), mask(1, [0, 1, 0, 1]), mask(1, [0, 0, 1, 1])]
    assert len({first, *others}) == 5


def test_every_dropout_of_a_model_has_its_own_salt() -> None:
    m = replace(TINY["gpt2"], dropout=0.1)
    calls = [c for c in record(model.chain(m, 2, T), None).passes["F"] if c.kernel == "dropout_fwd"]
    assert len(calls) == len({c.ints[-1] for c in calls}) == 1 + 2 * m.layers
    assert "dropout_fwd" not in [c.kernel for c in record(model.chain(m, 2, T, logits=True), None, False).passes["F"]]


# --- whole models

TINY = {
    "gpt2": model.resolve(ModelConfig(family="gpt2", layers=2, heads=2, width=6, context=7, vocab=11)),
    "llama": model.resolve(ModelConfig(layers=2, heads=4, kv_heads=2, width=8, ffn=10, context=7, vocab=11)),
}


def model_rig(m: ModelConfig, change: Any = lambda r: r, compute: str = "r", **options: object) -> Rig:
    rig = Rig(model.chain(m, 2, T, scale=1 / N, **options), change=change, compute=compute)
    rng = np.random.default_rng(3)
    for name, tensor in rig.recording.params.items():
        # Larger than at the start of a training run, so that no part of the model is nearly linear.
        rig[name][...] = rng.normal(1.0 if "norm" in name and "weight" in name else 0.0, 0.3, tensor.shape)
    rig.fill({"ids": rng.integers(0, m.vocab, N), "targets": rng.integers(0, m.vocab, N)})
    return rig.fill(KEY) if "key" in rig.recording.inputs else rig


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", TINY)
def test_gradients_of_a_whole_model(family: str, dropout: float) -> None:
    check_gradients(model_rig(replace(TINY[family], dropout=dropout)), scale=1 / N, probes=6)


@pytest.mark.parametrize("family", TINY)
def test_recomputing_blocks_changes_no_bit(family: str) -> None:
    m = replace(TINY[family], dropout=0.2)
    plain, again = model_rig(m).clear().run(), model_rig(m, recompute="block").clear().run()
    np.testing.assert_array_equal(plain["y"], again["y"])
    for name in plain.recording.params:
        np.testing.assert_array_equal(plain.grad(name), again.grad(name))


@pytest.mark.parametrize("bounds", [(0, 4), (0, 1, 4), (0, 2, 3, 4), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("family", TINY)
def test_stages_one_after_another_are_the_whole_model(family: str, bounds: tuple[int, ...]) -> None:
    m = replace(TINY[family], dropout=0.2)
    whole = model_rig(m).clear().run()
    stages, x_shape, rigs = model.cut(model.chain(m, 2, T, scale=1 / N), bounds), None, []
    for stage in stages:
        rig = Rig(stage, x_shape).clear()
        rig.fill({k: whole[k] for k in (*rig.recording.params, *rig.recording.inputs)})
        if rigs:
            rig["x"][...] = rigs[-1]["y"]
        rigs.append(rig.run("F"))
        x_shape = rig.recording.y.shape
    for rig, later in zip(reversed(rigs), [None, *reversed(rigs)][:-1], strict=True):
        if later is not None:
            rig["dy"][...] = later["dx"]
        rig.run("B", "W")
    assert [name for stage in stages for name in stage.params] == list(whole.recording.params)
    np.testing.assert_array_equal(rigs[-1]["y"], whole["y"])
    for rig in rigs:
        for name in rig.recording.params:
            np.testing.assert_array_equal(rig.grad(name), whole.grad(name), err_msg=name)


@pytest.mark.parametrize("family", TINY)
def test_the_model_for_generation_has_the_same_parameters_and_sees_no_later_token(family: str) -> None:
    m = TINY[family]
    trained, rig = model_rig(m), Rig(model.chain(m, 2, T, logits=True))
    assert trained.recording.params.keys() == rig.recording.params.keys()
    rig.fill({k: trained[k] for k in (*rig.recording.params, "ids")}).run("F")
    before = rig["y"].copy()
    assert before.shape == (N, m.vocab)
    changed = T - 2
    rig["ids"][changed] = (rig["ids"][changed] + 1) % m.vocab
    rig.run("F")
    same = [row for row in range(N) if np.array_equal(rig["y"][row], before[row])]
    assert same == [row for row in range(N) if row not in range(changed, T)]


# --- the model as data


def test_parameter_names_and_shapes() -> None:
    names = {n: s.shape for n, s in model.chain(TINY["llama"], 1, T).params.items() if not n.startswith("layer.1")}
    assert names == {
        "embed.weight": (11, 8), "layer.0.norm1.weight": (8,), "layer.0.attention.qkv.weight": (16, 8),
        "layer.0.attention.out.weight": (8, 8), "layer.0.norm2.weight": (8,), "layer.0.mlp.gate_up.weight": (20, 8),
        "layer.0.mlp.down.weight": (8, 10), "head.norm.weight": (8,), "head.weight": (11, 8),
    }  # fmt: skip
    gpt2 = model.chain(TINY["gpt2"], 1, T).params
    assert gpt2["embed.position"].shape == (7, 6) and gpt2["layer.1.attention.qkv.bias"].shape == (18,)
    assert {n for n, s in gpt2.items() if s.decay} == {n for n, s in gpt2.items() if len(s.shape) == 2}
    assert model.ties(TINY["gpt2"]) == {"head.weight": "embed.weight"} and model.ties(TINY["llama"]) == {}


# Published counts: Radford et al. 2019 as released (Hugging Face model cards), Llama 3 and 3.2 model files.
@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("gpt2-124M", 124_439_808),
        ("gpt2-350M", 354_823_168),
        ("gpt2-774M", 774_030_080),
        ("gpt2-1.5B", 1_557_611_200),
        ("llama-1B", 1_235_814_400),
        ("llama-8B", 8_030_261_248),
        ("llama-70B", 70_553_706_496),
        ("llama-405B", 405_853_388_800),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset: str, count: int) -> None:
    assert model.parameter_count(model.resolve(ModelConfig(preset=preset))) == count


@pytest.mark.parametrize("family", TINY)
def test_model_flops_are_those_of_the_recorded_products(family: str) -> None:
    m = TINY[family]
    r = record(model.chain(m, 3, T), None)
    products = sum(c.flops for p in "FBW" for c in r.passes[p] if c.kernel.startswith("linear_"))
    products += sum(6 * c.env["n"] * c.env["v"] * c.env["c"] for c in r.passes["F"] if c.kernel == HEAD)
    scores = 3 * sum(c.flops for c in r.passes["F"] if c.kernel == "attention_fwd")
    assert math.isclose(model.model_flops_per_token(m, T) * 3 * T, products + scores)


def test_resolve_fills_from_the_preset_and_the_family() -> None:
    m = model.resolve(ModelConfig(preset="llama-8B"))
    assert (m.layers, m.heads, m.kv_heads, m.theta, m.tied) == (32, 32, 8, 500000.0, False)
    assert model.resolve(m) == m
    small = model.resolve(ModelConfig(preset="gpt2-124M", layers=3, vocab=500))
    assert (small.layers, small.vocab, small.width, small.family, small.tied) == (3, 500, 768, "gpt2", True)
    tiny = model.resolve(ModelConfig(preset="llama-tiny", tied=False), vocab=300)
    assert (tiny.vocab, tiny.tied) == (300, False)
    wider = model.resolve(ModelConfig(preset="gpt2-124M", width=1536))
    assert wider.ffn == 4 * 1536


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "lama-8B"}, "did you mean llama-8B"),
        ({"preset": "llama-8B", "family": "gpt2"}, "preset llama-8B is llama"),
        ({"layers": 0}, "model.layers must be 1 or more"),
        ({"width": 7}, "model.width = 7 does not divide by model.heads = 2"),
        ({"heads": 4, "kv_heads": 3, "width": 8}, "model.heads = 4 does not divide by model.kv_heads = 3"),
        ({"width": 6}, "model.width / model.heads = 3 is odd"),
        ({"vocab": 0}, "set model.vocab or data.path"),
        ({"context": 0}, "model.context is not set"),
        ({"dropout": 1.0}, "model.dropout is 1.0"),
    ],
)
def test_impossible_models_get_a_sentence(change: dict[str, object], message: str) -> None:
    good = ModelConfig(layers=2, heads=2, width=8, context=16, vocab=50)
    assert model.resolve(good).ffn == 64
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as error:
        model.resolve(replace(good, **change))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_context_and_vocabulary_are_held_against_the_run() -> None:
    good = ModelConfig(layers=2, heads=2, width=8, context=16, vocab=50)
    with pytest.raises(UserError, match=r"shorter than train\.length = 17"):
        model.resolve(good, length=17)
    with pytest.raises(UserError, match="tokenizer has 51 tokens"):
        model.resolve(good, vocab=51)
    with pytest.raises(UserError, match="a sequence of 17 tokens"):
        model.chain(model.resolve(good), 1, 17)
    for bounds in [(0, 2, 2, 4), (0, 3), (1, 4), (0,), ()]:
        with pytest.raises(UserError, match="4 slots"):
            model.cut(model.chain(model.resolve(good), 1, 16), bounds)


def test_initial_values_are_a_function_of_seed_and_name() -> None:
    specs = model.chain(model.resolve(ModelConfig(preset="gpt2-tiny", vocab=300)), 1, T).params
    names = ["layer.0.attention.out.weight", "layer.1.attention.out.weight"]
    a, b, c = (model.initial(n, specs[n], seed) for n, seed in ((names[0], 1), (names[1], 1), (names[0], 2)))
    np.testing.assert_array_equal(a, model.initial(names[0], specs[names[0]], 1))
    assert a.dtype == np.float32 and not np.array_equal(a, b) and not np.array_equal(a, c)
    # 128 x 128 normal values: the deviation is known to 0.6 %, so these bounds are five of its errors wide.
    assert abs(a.std() / (0.02 / math.sqrt(8)) - 1) < 0.03
    up = model.initial("layer.0.mlp.up.weight", specs["layer.0.mlp.up.weight"], 1)
    assert abs(up.std() / 0.02 - 1) < 0.015 and abs(up.mean()) < 0.0004
    assert np.all(model.initial("head.norm.weight", specs["head.norm.weight"], 1) == 1)
    assert np.all(model.initial("head.norm.bias", specs["head.norm.bias"], 1) == 0)


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("family", TINY)
def test_the_native_backend_agrees_on_a_whole_model_with_dropout(family: str, recompute: str) -> None:
    m = replace(TINY[family], dropout=0.2)
    expected = model_rig(m, recompute=recompute).clear().run()
    rig = Rig(model.chain(m, 2, T, scale=1 / N, recompute=recompute), backend=open_backend("cpu", 1)).clear()
    rig.fill({k: expected[k] for k in (*rig.recording.params, *rig.recording.inputs)}).run()
    np.testing.assert_allclose(rig["y"], expected["y"], rtol=1e-5)
    for name in rig.recording.params:
        largest = np.abs(expected.grad(name)).max()
        np.testing.assert_allclose(rig.grad(name), expected.grad(name), rtol=0, atol=1e-5 * largest, err_msg=name)
