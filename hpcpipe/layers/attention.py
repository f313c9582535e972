"""Attention: causal self-attention with grouped queries, from one fused projection (Vaswani 2017; Ainslie 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcpipe.layers.layer import Ops, Saved, Tensor, own
from hpcpipe.layers.linear import Linear


class Attention:
    """y = out(attention(qkv(x))), over sequences of ``length`` tokens; rows of qkv are [q heads | k heads | v heads].

    ``theta`` is the base of the rotary angles, None for no rotation. The rotation is in place on qkv, which no other
    layer sees, and its inverse in place on dqkv. ``out_std`` is the deviation that the output projection starts with.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        length: int,
        theta: float | None = None,
        bias: bool = False,
        std: float = 0.02,
        out_std: float = 0.02,
    ) -> None:
        d = width // heads
        self.dims = {"t": length, "h": heads, "k": kv_heads, "d": d}
        self.theta = theta
        self.qkv = Linear(width, (heads + 2 * kv_heads) * d, bias, std)
        self.out = Linear(heads * d, width, bias, out_std)
        self.params = {f"qkv.{n}": s for n, s in self.qkv.params.items()}
        self.params |= {f"out.{n}": s for n, s in self.out.params.items()}

    def forward(self, ops: Ops, p: Mapping[str, Tensor], x: Any) -> tuple[Any, Saved]:
        qkv, saved_qkv = self.qkv.forward(ops, own(p, "qkv.", self.qkv), x)
        if self.theta is not None:
            ops.rope_fwd(qkv, theta=self.theta, **self.dims)
        a, lse = ops.attention_fwd(qkv, **self.dims)
        y, saved_out = self.out.forward(ops, own(p, "out.", self.out), a)
        return y, (saved_qkv, qkv, a, lse, saved_out)

    def grad_input(self, ops: Ops, p: Mapping[str, Tensor], dy: Any, saved: Saved) -> tuple[Any, Saved]:
        saved_qkv, qkv, a, lse, saved_out = saved
        da, owed_out = self.out.grad_input(ops, own(p, "out.", self.out), dy, saved_out)
        dqkv = ops.attention_dx(da, a, lse, qkv, **self.dims)
        if self.theta is not None:
            ops.rope_dx(dqkv, theta=self.theta, **self.dims)
        dx, owed_qkv = self.qkv.grad_input(ops, own(p, "qkv.", self.qkv), dqkv, saved_qkv)
        return dx, (owed_out, owed_qkv)

    def grad_weight(self, ops: Ops, g: Mapping[str, Tensor], owed: Saved) -> None:
        owed_out, owed_qkv = owed
        self.out.grad_weight(ops, own(g, "out.", self.out), owed_out)
        self.qkv.grad_weight(ops, own(g, "qkv.", self.qkv), owed_qkv)
