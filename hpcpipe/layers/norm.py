"""LayerNorm (Ba, Kiros, Hinton 2016) and RMSNorm (Zhang, Sennrich 2019) over the channels of a token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcpipe.layers.layer import Ops, Saved, Tensor, vector


class LayerNorm:
    """y = (x - mean) / sqrt(variance + eps) * weight + bias."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        self.eps = eps
        self.params = {"weight": vector(width, "ones"), "bias": vector(width, "zeros")}

    def forward(self, ops: Ops, p: Mapping[str, Tensor], x: Any) -> tuple[Any, Saved]:
        y, mean, rstd = ops.layernorm_fwd(x, p["weight"], p["bias"], eps=self.eps)
        return y, (x, mean, rstd)

    def grad_input(self, ops: Ops, p: Mapping[str, Tensor], dy: Any, saved: Saved) -> tuple[Any, Saved]:
        return ops.layernorm_dx(dy, saved[0], p["weight"], *saved[1:]), (dy, *saved)

    def grad_weight(self, ops: Ops, g: Mapping[str, Tensor], owed: Saved) -> None:
        ops.layernorm_dw(g["weight"], g["bias"], *owed)


class RMSNorm:
    """y = x / sqrt(mean(x²) + eps) * weight."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        self.eps = eps
        self.params = {"weight": vector(width, "ones")}

    def forward(self, ops: Ops, p: Mapping[str, Tensor], x: Any) -> tuple[Any, Saved]:
        y, rstd = ops.rmsnorm_fwd(x, p["weight"], eps=self.eps)
        return y, (x, rstd)

    def grad_input(self, ops: Ops, p: Mapping[str, Tensor], dy: Any, saved: Saved) -> tuple[Any, Saved]:
        x, rstd = saved
        return ops.rmsnorm_dx(dy, x, p["weight"], rstd), (dy, x, rstd)

    def grad_weight(self, ops: Ops, g: Mapping[str, Tensor], owed: Saved) -> None:
        ops.rmsnorm_dw(g["weight"], *owed)
