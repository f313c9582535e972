"""LinearCrossEntropy: where a model ends, from the residual stream to one number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcpipe.layers.layer import Ops, Saved, Tensor, matrix


class LinearCrossEntropy:
    """logits = x wᵀ; y = Σ -log softmax(logits)[target], a float64 of shape (1,). Reads the loader's ``targets``.

    The forward pass already overwrites the logits with their gradient, so no second [tokens, vocab] buffer exists.
    That gradient carries ``scale`` = 1 / (tokens of the whole step), so that the gradients of a step sum up to those
    of its mean loss.
    """

    def __init__(self, width: int, vocab: int, scale: float, std: float = 0.02) -> None:
        self.scale = scale
        self.params = {"weight": matrix(vocab, width, std)}

    def forward(self, ops: Ops, p: Mapping[str, Tensor], x: Any) -> tuple[Any, Saved]:
        targets = ops.input("targets", (x.shape[0],), "i")
        logits = ops.linear_fwd(x, p["weight"], None)
        loss, _ = ops.crossentropy_fwd(logits, targets, scale=self.scale)
        return loss, (logits, x)

    def grad_input(self, ops: Ops, p: Mapping[str, Tensor], dy: None, saved: Saved) -> tuple[Any, Saved]:
        dlogits, _ = saved
        return ops.linear_dx(dlogits, p["weight"]), saved

    def grad_weight(self, ops: Ops, g: Mapping[str, Tensor], owed: Saved) -> None:
        dlogits, x = owed
        ops.linear_dw(g["weight"], None, dlogits, x)
