"""Dropout (Srivastava et al. 2014) on what another layer returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcpipe.layers.layer import Layer, Ops, Saved, Tensor


class Dropout:
    """y = layer(x) mask / (1 - p), with the layer's own parameter names.

    No mask is stored: it is a function of the loader's ``key`` = [seed, step, sample, on] and of ``salt``, which must
    be different at every place of a model that drops. on = 0 (evaluation) drops nothing.
    """

    def __init__(self, layer: Layer, p: float, salt: int) -> None:
        self.layer, self.scalars = layer, {"p": p, "salt": salt}
        self.params = layer.params

    def forward(self, ops: Ops, p: Mapping[str, Tensor], x: Any) -> tuple[Any, Saved]:
        y, saved = self.layer.forward(ops, p, x)
        return ops.dropout_fwd(y, ops.input("key", (4,), "l"), **self.scalars), saved

    def grad_input(self, ops: Ops, p: Mapping[str, Tensor], dy: Any, saved: Saved) -> tuple[Any, Saved]:
        # The mask and the factor do not depend on the values, so the gradient goes through the same kernel.
        dropped = ops.dropout_fwd(dy, ops.input("key", (4,), "l"), **self.scalars)
        return self.layer.grad_input(ops, p, dropped, saved)

    def grad_weight(self, ops: Ops, g: Mapping[str, Tensor], owed: Saved) -> None:
        self.layer.grad_weight(ops, g, owed)
