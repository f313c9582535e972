"""The feed-forward halves of a block: two activations without parameters, and the chains around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcpipe.layers.combinators import Chain
from hpcpipe.layers.layer import Ops, ParamSpec, Saved, Tensor
from hpcpipe.layers.linear import Linear


class GELU:
    """The tanh form (Hendrycks, Gimpel 2016), [n, c] -> [n, c]."""

    params: Mapping[str, ParamSpec] = {}

    def forward(self, ops: Ops, p: Mapping[str, Tensor], x: Any) -> tuple[Any, Saved]:
        return ops.gelu_fwd(x), x

    def grad_input(self, ops: Ops, p: Mapping[str, Tensor], dy: Any, saved: Saved) -> tuple[Any, Saved]:
        return ops.gelu_dx(dy, saved), None

    def grad_weight(self, ops: Ops, g: Mapping[str, Tensor], owed: Saved) -> None:
        """Nothing is owed."""


class SwiGLU:
    """silu(gate) up (Shazeer 2020) of x = [gate | up], [n, 2f] -> [n, f]."""

    params: Mapping[str, ParamSpec] = {}

    def forward(self, ops: Ops, p: Mapping[str, Tensor], x: Any) -> tuple[Any, Saved]:
        return ops.swiglu_fwd(x), x

    def grad_input(self, ops: Ops, p: Mapping[str, Tensor], dy: Any, saved: Saved) -> tuple[Any, Saved]:
        return ops.swiglu_dx(dy, saved), None

    def grad_weight(self, ops: Ops, g: Mapping[str, Tensor], owed: Saved) -> None:
        """Nothing is owed."""


def gelu_mlp(width: int, ffn: int, std: float = 0.02, out_std: float = 0.02) -> Chain:
    """down(gelu(up(x))) with biases, as in GPT-2."""
    return Chain(up=Linear(width, ffn, True, std), gelu=GELU(), down=Linear(ffn, width, True, out_std))


def swiglu_mlp(width: int, ffn: int, std: float = 0.02, out_std: float = 0.02) -> Chain:
    """down(silu(gate(x)) up(x)) without biases, as in Llama; gate and up are one matrix, gate's rows first."""
    return Chain(gate_up=Linear(width, 2 * ffn, False, std), swiglu=SwiGLU(), down=Linear(ffn, width, False, out_std))
