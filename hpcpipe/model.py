"""The two model families as data and as one Chain of named slots: embed, layer.0 ... layer.L-1, head.

A ModelConfig goes in; out come the chain, its cut into stages, the ties between parameters, initial values and counts.
Nothing here knows a rank or a device: the same chain is priced by the planner, run by every backend and saved by name.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from hpcpipe.config import ModelConfig, UserError
from hpcpipe.layers.attention import Attention
from hpcpipe.layers.combinators import Chain, Recompute, Residual
from hpcpipe.layers.dropout import Dropout
from hpcpipe.layers.embedding import Embedding
from hpcpipe.layers.layer import Layer, ParamSpec
from hpcpipe.layers.linear import Linear
from hpcpipe.layers.loss import BLOCK, LinearCrossEntropy
from hpcpipe.layers.mlp import gelu_mlp, swiglu_mlp
from hpcpipe.layers.norm import LayerNorm, RMSNorm

INIT_STD = 0.02


def _gpt2(layers: int, heads: int, width: int, context: int = 1024, vocab: int = 50257) -> dict[str, Any]:
    return {"family": "gpt2", "layers": layers, "heads": heads, "kv_heads": heads, "width": width, "ffn": 4 * width,
            "context": context, "vocab": vocab, "tied": True}  # fmt: skip


def _llama(layers: int, heads: int, kv_heads: int, width: int, ffn: int, context: int = 8192, vocab: int = 128256,
           tied: bool = False, theta: float = 500000.0) -> dict[str, Any]:  # fmt: skip
    return {"family": "llama", "layers": layers, "heads": heads, "kv_heads": kv_heads, "width": width, "ffn": ffn,
            "context": context, "vocab": vocab, "tied": tied, "theta": theta}  # fmt: skip


# GPT-2: Radford et al. 2019. Llama 3: arXiv:2407.21783, table 3, at the context of its pre-training (the longer one of
# 3.1 and later comes with stretched rotary angles); llama-1B is Llama 3.2. The tiny and small sizes are ours and take
# the vocabulary of the data's tokenizer.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "gpt2-tiny": _gpt2(4, 4, 128, context=128, vocab=0),
    "gpt2-small": _gpt2(6, 6, 384, context=256, vocab=0),
    "gpt2-124M": _gpt2(12, 12, 768),
    "gpt2-350M": _gpt2(24, 16, 1024),
    "gpt2-774M": _gpt2(36, 20, 1280),
    "gpt2-1.5B": _gpt2(48, 25, 1600),
    "llama-tiny": _llama(4, 4, 2, 128, 384, context=128, vocab=0, tied=True, theta=10000.0),
    "llama-small": _llama(6, 6, 2, 384, 1024, context=256, vocab=0, tied=True, theta=10000.0),
    "llama-1B": _llama(16, 32, 8, 2048, 8192, tied=True),
    "llama-8B": _llama(32, 32, 8, 4096, 14336),
    "llama-70B": _llama(80, 64, 8, 8192, 28672),
    "llama-405B": _llama(126, 128, 8, 16384, 53248),
}


def resolve(m: ModelConfig, vocab: int = 0, length: int = 0) -> ModelConfig:
    """The model with every size known; a key that still has its default comes from the preset, then from the family.

    ``vocab`` is what the data's tokenizer has, ``length`` the tokens per sequence of the run; 0 where not known.
    Resolving twice changes nothing. Raises UserError.
    """
    m = _with_preset(m)
    missing = [name for name in ("layers", "heads", "width") if not getattr(m, name)]
    if missing:
        names = " and ".join(f"model.{name}" for name in missing)
        raise UserError(f"model: {names} must be 1 or more; set them or name a preset ({', '.join(PRESETS)})")
    ffn = 4 * m.width if m.family == "gpt2" else -(-8 * m.width // (3 * 64)) * 64
    m = replace(
        m,
        kv_heads=m.kv_heads or m.heads,
        ffn=m.ffn or ffn,
        context=m.context or length,
        vocab=m.vocab or vocab,
        tied=m.family == "gpt2" if m.tied is None else m.tied,
    )
    _validate(m, vocab, length)
    return m


def _with_preset(m: ModelConfig) -> ModelConfig:
    if not m.preset:
        return m
    if m.preset not in PRESETS:
        near = difflib.get_close_matches(m.preset, PRESETS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else "leave it out for a shape of your own"
        raise UserError(f"model.preset is {m.preset!r}, which is none of {', '.join(PRESETS)}; {hint}")
    preset = PRESETS[m.preset]
    usual = {f.name: f.default for f in fields(ModelConfig)}
    if m.family not in (usual["family"], preset["family"]):
        raise UserError(
            f"model.family is {m.family}, but preset {m.preset} is {preset['family']}; leave one of them out"
        )
    # Sizes that hang together: a model that is made wider or gets other heads does not keep the preset's derived ones.
    derived = {"width": ("ffn",), "heads": ("kv_heads",)}
    stale = {d for k, ds in derived.items() if getattr(m, k) not in (0, preset[k]) for d in ds}
    return replace(m, **{k: v for k, v in preset.items() if getattr(m, k) == usual[k] and k not in stale})


def _validate(m: ModelConfig, vocab: int, length: int) -> None:
    if m.context < 1:
        raise UserError("model.context is not set; give the longest sequence in tokens")
    if m.vocab < 1:
        raise UserError("model.vocab is not set and there is no data to take it from; set model.vocab or data.path")
    if m.vocab < vocab:
        raise UserError(f"model.vocab is {m.vocab}, but the data's tokenizer has {vocab} tokens; raise it to {vocab}")
    if m.width % m.heads:
        raise UserError(f"model.width = {m.width} does not divide by model.heads = {m.heads}; make it a multiple")
    if m.heads % m.kv_heads:
        raise UserError(f"model.heads = {m.heads} does not divide by model.kv_heads = {m.kv_heads}; make it a multiple")
    if m.family == "llama" and m.width // m.heads % 2:
        raise UserError(
            f"model.width / model.heads = {m.width // m.heads} is odd, but rotary positions turn pairs; make it even"
        )
    if m.context < length:
        raise UserError(f"model.context = {m.context} is shorter than train.length = {length}; make it at least that")
    if not 0 <= m.dropout < 1:
        raise UserError(f"model.dropout is {m.dropout}, expected 0 or more and less than 1")


# --- the chain


def chain(
    m: ModelConfig,
    microbatch: int,
    length: int,
    scale: float = 1.0,
    recompute: str = "none",
    logits: bool = False,
    at_once: int = BLOCK,
) -> Chain:
    """The whole (resolved) model for microbatches of ``microbatch`` sequences of ``length`` tokens.

    ``scale`` multiplies the gradient of the summed loss: 1 / (tokens of a step). ``recompute = "block"`` keeps only the
    input of each block. ``logits`` makes the model for generation: [tokens, vocab] at the end, no loss, no dropout.
    ``at_once`` is how many logits the loss makes at once.
    """
    if length > m.context:
        raise UserError(f"model.context = {m.context} is shorter than a sequence of {length} tokens; shorten the text")
    if logits:
        m = replace(m, dropout=0.0)
    positions = m.context if m.family == "gpt2" else 0
    embed = Embedding(m.vocab, m.width, microbatch * length, length, positions, INIT_STD)
    slots: dict[str, Layer] = {"embed": _dropped(m, embed, 0)}
    for i in range(m.layers):
        block = _block(m, length, salt=4 * (i + 1))
        slots[f"layer.{i}"] = Recompute(block) if recompute == "block" else block
    loss = LinearCrossEntropy(m.width, m.vocab, scale, INIT_STD, at_once)
    last = Linear(m.width, m.vocab, std=INIT_STD) if logits else loss
    slots["head"] = Chain(Chain(norm=_norm(m)), last)
    return Chain(**slots)


def _norm(m: ModelConfig) -> Layer:
    return LayerNorm(m.width, m.eps) if m.family == "gpt2" else RMSNorm(m.width, m.eps)


def _dropped(m: ModelConfig, layer: Layer, salt: int) -> Layer:
    return Dropout(layer, m.dropout, salt) if m.dropout else layer


def _block(m: ModelConfig, length: int, salt: int) -> Layer:
    """x + attention(norm1(x)), then x + mlp(norm2(x)): Radford et al. 2019, Touvron et al. 2023."""
    gpt2, deep = m.family == "gpt2", INIT_STD / math.sqrt(2 * m.layers)
    theta = None if gpt2 else m.theta
    attention = Attention(m.width, m.heads, m.kv_heads, length, theta, bias=gpt2, std=INIT_STD, out_std=deep)
    mlp = (gelu_mlp if gpt2 else swiglu_mlp)(m.width, m.ffn, INIT_STD, deep)
    return Chain(
        Residual(_dropped(m, Chain(norm1=_norm(m), attention=attention), salt)),
        Residual(_dropped(m, Chain(norm2=_norm(m), mlp=mlp), salt + 1)),
    )


def cut(whole: Chain, bounds: Sequence[int]) -> list[Chain]:
    """Stages of a chain: stage s has the slots bounds[s] to bounds[s + 1] - 1, under the same full names.

    ``bounds`` rises from 0 to the number of slots. Raises UserError.
    """
    names, stages = list(whole.children), list(pairwise(bounds))
    if not stages or bounds[0] != 0 or bounds[-1] != len(names) or any(a >= b for a, b in stages):
        raise UserError(
            f"pipeline.cut: bounds {tuple(bounds)} do not give every stage at least one of the {len(names)} slots "
            f"(embedding, {len(names) - 2} layers, head); use fewer stages or another cut"
        )
    return [Chain(**{n: whole.children[n] for n in names[a:b]}) for a, b in stages]


def ties(m: ModelConfig) -> dict[str, str]:
    """A tied copy -> the parameter that owns its value; their gradients are summed, owner + copy."""
    return {"head.weight": "embed.weight"} if m.tied else {}


# --- numbers


def parameters(m: ModelConfig) -> dict[str, ParamSpec]:
    """Every parameter by its checkpoint name, tied copies left out."""
    copies = ties(m)
    return {name: spec for name, spec in chain(m, 1, 1).params.items() if name not in copies}


def parameter_count(m: ModelConfig) -> int:
    """Numbers that are learned; a tied matrix counts once."""
    return sum(math.prod(spec.shape) for spec in parameters(m).values())


def model_flops_per_token(m: ModelConfig, length: int) -> float:
    """Floating-point operations of the mathematics for one trained token (forward and backward), hardware aside.

    6 N + 6 L (length + 1) width, where N counts the weights of the matrix products (blocks and head, also when it is
    tied; no lookups, norms or biases). The second term is causal attention, its visible half only: two products of
    (length + 1) width FLOPs forward, four backward. Nothing is counted twice for being recomputed. (Kaplan et al.
    2020, section 2.1; Chowdhery et al. 2022, appendix B.)
    """
    products = [s for name, s in chain(m, 1, 1).params.items() if not name.startswith("embed.") and len(s.shape) == 2]
    return 6.0 * sum(math.prod(s.shape) for s in products) + 6.0 * m.layers * (length + 1) * m.width


def initial(name: str, spec: ParamSpec, seed: int) -> npt.NDArray[np.float32]:
    """The starting value of a parameter, float32: a function of (seed, name) alone, so the same on every layout.

    A tied copy starts as its owner: ask with the owner's name.
    """
    kind, *scale = spec.init
    if kind != "normal":
        return np.full(spec.shape, {"zeros": 0.0, "ones": 1.0}[kind], dtype=np.float32)
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "little")
    values = np.random.Generator(np.random.Philox(key=key)).standard_normal(spec.shape, dtype=np.float32)
    values *= np.float32(scale[0])
    return values
