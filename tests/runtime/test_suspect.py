"""A loss that is not finite names where it came from: the first tensor, and the layer it belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcpipe import model
from hpcpipe.config import UserError
from hpcpipe.runtime.optimizer import AdamW
from tests.small_run import run, write_tokens


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("data"))


def planted(monkeypatch: pytest.MonkeyPatch, name: str, value: float) -> None:
    real = model.initial

    def initial(wanted: str, spec: Any, seed: int) -> Any:
        values = real(wanted, spec, seed).copy()
        if wanted == name:
            values.flat[0] = value
        return values

    monkeypatch.setattr(model, "initial", initial)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_parameter_that_is_no_number_is_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, backend: str
) -> None:
    planted(monkeypatch, "layer.1.mlp.down.weight", np.nan)
    said = r"step 1: loss nan .* \(before F\d\.\d+ the parameter layer\.1\.mlp\.down\.weight is not finite\); lower"
    with pytest.raises(UserError, match=said):
        run(data, tmp_path / "run", ranks, "llama", device__backend=backend)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_product_that_overflows_is_named_with_its_layer(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    planted(monkeypatch, "layer.1.mlp.down.weight", 1e38)
    planted(monkeypatch, "layer.1.mlp.gate_up.weight", 1e30)
    said = r"in F\d\.\d+ the output of linear_fwd with layer\.1\.mlp\.down\.weight is the first"
    with pytest.raises(UserError, match=said) as caught:
        run(data, tmp_path / "run", ranks, "llama")
    assert "start again: the run goes on from its newest checkpoint" in str(caught.value)


def test_a_gradient_alone_is_named_on_the_way_back(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[str] = []
    begin, squares = AdamW.__init__, AdamW.squares

    def noted(self: AdamW, executor: Any, params: Any, config: Any, names: Any, *rest: Any) -> None:
        known.extend(names)
        begin(self, executor, params, config, names, *rest)

    def spoilt(self: AdamW, into: np.ndarray) -> None:
        squares(self, into)
        into[[2, 4]] = np.nan

    monkeypatch.setattr(AdamW, "__init__", noted)
    monkeypatch.setattr(AdamW, "squares", spoilt)
    with pytest.raises(UserError) as caught:
        run(data, tmp_path / "run", 1, "untied")
    assert f"(the gradient of {known[4]} is the first on the way back that is not)" in str(caught.value)
