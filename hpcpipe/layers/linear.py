"""Linear: y = x wᵀ + b."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcpipe.layers.layer import Ops, Saved, Tensor, matrix, vector


class Linear:
    """[n, inputs] -> [n, outputs]; the weight is [outputs, inputs] and starts normal with deviation ``std``."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False, std: float = 0.02) -> None:
        self.params = {"weight": matrix(outputs, inputs, std)}
        if bias:
            self.params["bias"] = vector(outputs, "zeros")

    def forward(self, ops: Ops, p: Mapping[str, Tensor], x: Any) -> tuple[Any, Saved]:
        return ops.linear_fwd(x, p["weight"], p.get("bias")), x

    def grad_input(self, ops: Ops, p: Mapping[str, Tensor], dy: Any, saved: Saved) -> tuple[Any, Saved]:
        return ops.linear_dx(dy, p["weight"]), (dy, saved)

    def grad_weight(self, ops: Ops, g: Mapping[str, Tensor], owed: Saved) -> None:
        dy, x = owed
        ops.linear_dw(g["weight"], g.get("bias"), dy, x)
