"""The feed-forward half of a block: a product, an activation, a product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcpipe.layers.layer import Ops, Saved, Tensor, own
from hpcpipe.layers.linear import Linear


class MLP:
    """down(act(up(x))). ``act`` names the kernel: gelu or swiglu; ``name`` is that of the first product.

    What the activation gives is not kept: its gradient's kernel makes it again on the way, for the weights of ``down``.
    """

    def __init__(self, act: str, name: str, up: Linear, down: Linear) -> None:
        self.act, self.up, self.down = act, up, down
        self.first, self.last = f"{name}.", "down."
        self.params = {self.first + n: s for n, s in up.params.items()}
        self.params |= {self.last + n: s for n, s in down.params.items()}

    def forward(self, ops: Ops, p: Mapping[str, Tensor], x: Any) -> tuple[Any, Saved]:
        u, saved = self.up.forward(ops, own(p, self.first, self.up), x)
        a = getattr(ops, f"{self.act}_fwd")(u)
        y, _ = self.down.forward(ops, own(p, self.last, self.down), a)
        return y, (saved, u)

    def grad_input(self, ops: Ops, p: Mapping[str, Tensor], dy: Any, saved: Saved) -> tuple[Any, Saved]:
        saved_up, u = saved
        da, _ = self.down.grad_input(ops, own(p, self.last, self.down), dy, None)
        du, a = getattr(ops, f"{self.act}_dx")(da, u)
        dx, owed_up = self.up.grad_input(ops, own(p, self.first, self.up), du, saved_up)
        return dx, ((dy, a), owed_up)

    def grad_weight(self, ops: Ops, g: Mapping[str, Tensor], owed: Saved) -> None:
        owed_down, owed_up = owed
        self.down.grad_weight(ops, own(g, self.last, self.down), owed_down)
        self.up.grad_weight(ops, own(g, self.first, self.up), owed_up)


def gelu_mlp(width: int, ffn: int, std: float = 0.02, out_std: float = 0.02) -> MLP:
    """down(gelu(up(x))) with biases, as in GPT-2: the tanh form (Hendrycks, Gimpel 2016)."""
    return MLP("gelu", "up", Linear(width, ffn, True, std), Linear(ffn, width, True, out_std))


def swiglu_mlp(width: int, ffn: int, std: float = 0.02, out_std: float = 0.02) -> MLP:
    """down(silu(gate(x)) up(x)) without biases, as in Llama (Shazeer 2020); gate and up are one matrix, gate first."""
    return MLP("swiglu", "gate_up", Linear(width, 2 * ffn, False, std), Linear(ffn, width, False, out_std))
