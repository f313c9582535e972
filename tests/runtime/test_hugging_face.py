"""The same logits, loss and gradients as Hugging Face transformers from the same weights, within 1e-5 in float32.

From golden files always; against the live library where it is installed (marked ``peers``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import numpy as np
import pytest

from hpcpipe import model
from hpcpipe.backends.backend import Backend, open_backend
from hpcpipe.backends.reference import ReferenceBackend
from hpcpipe.config import ModelConfig
from tests.golden import make_hugging_face as golden
from tests.harness import Rig

BACKENDS = ("reference", "cpu")


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    yield open_backend(request.param, 1)


def compare(backend: Backend, m: ModelConfig, arrays: Mapping[str, np.ndarray], tolerance: float = 1e-5) -> None:
    """Holds a whole model against theirs: every number within ``tolerance`` of the largest in its tensor."""
    sequences = arrays["sequences"]
    batch, length = sequences.shape[0], sequences.shape[1] - 1
    weights, gradients = (
        golden.ours({k.removeprefix(kind): v for k, v in arrays.items() if k.startswith(kind)}, m)
        for kind in ("weight/", "gradient/")
    )
    copies = model.ties(m)
    ids, targets = sequences[:, :-1].ravel(), sequences[:, 1:].ravel()

    def ready(rig: Rig, inputs: Mapping[str, np.ndarray]) -> Rig:
        assert rig.recording.params.keys() == weights.keys() | copies.keys()
        return rig.fill({k: weights[copies.get(k, k)] for k in rig.recording.params} | dict(inputs)).clear()

    shown = ready(Rig(model.chain(m, batch, length, logits=True), backend=backend), {"ids": ids}).run("F")
    close("logits", shown["y"].reshape(arrays["logits"].shape), arrays["logits"], tolerance)

    chain = model.chain(m, batch, length, scale=1 / (batch * length))
    trained = ready(Rig(chain, backend=backend), {"ids": ids, "targets": targets}).run("F", "B", "W")
    close("loss", trained["y"][0] / (batch * length), arrays["loss"], tolerance)
    for name, expected in gradients.items():
        mine = trained.grad(name) + sum(trained.grad(copy) for copy, owner in copies.items() if owner == name)
        close(name, mine, expected, tolerance)


def close(name: str, mine: np.ndarray, theirs: np.ndarray, tolerance: float) -> None:
    assert mine.shape == theirs.shape, name
    error = np.abs(mine - theirs).max() / np.abs(theirs).max()
    assert error < tolerance, f"{name} differs by {error:.1e} of its largest value"


def load(name: str) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    with np.load(golden.FOLDER / f"{name}.npz") as file:
        arrays = dict(file)
    return ModelConfig(**json.loads(str(arrays.pop("config")))), arrays


@pytest.mark.parametrize("name", golden.CASES)
def test_logits_loss_and_every_gradient_match_the_goldens(name: str, backend: Backend) -> None:
    m, arrays = load(name)
    assert m == golden.CASES[name], "the golden file is of another model; run python -m tests.golden.make_hugging_face"
    compare(backend, m, arrays)


@pytest.mark.parametrize("name", golden.CASES)
def test_float64_reference_is_as_near_as_their_float32_allows(name: str) -> None:
    compare(ReferenceBackend("float64"), *load(name), tolerance=5e-6)


def test_a_wrong_mapping_does_not_pass() -> None:
    m, arrays = load("llama_tied")
    swapped = dict(arrays)
    for kind in ("weight", "gradient"):
        gate, up = (f"{kind}/model.layers.0.mlp.{x}_proj.weight" for x in ("gate", "up"))
        swapped[gate], swapped[up] = arrays[up], arrays[gate]
    with pytest.raises(AssertionError, match="logits differs"):
        compare(ReferenceBackend(), m, swapped)
    with pytest.raises(KeyError, match="no parameter of ours"):
        golden.ours({k[7:]: v for k, v in arrays.items() if k.startswith("weight/")} | {"extra": np.zeros(1)}, m)


@pytest.mark.peers
@pytest.mark.parametrize("name", golden.CASES)
def test_live_transformers_gives_the_same(name: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    m = golden.CASES[name]
    sequences = np.random.default_rng(99).integers(0, m.vocab, (2, 8))
    compare(ReferenceBackend(), m, {"sequences": sequences, **golden.run(golden.transformers_model(m), sequences)})
