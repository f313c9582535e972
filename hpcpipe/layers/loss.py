"""LinearCrossEntropy: where a model ends, from the residual stream to one number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcpipe.layers.layer import Ops, Saved, Tensor, matrix

BLOCK = 1 << 22  # logits at once, about, unless somebody says otherwise: 16 MiB
FEWEST = 341  # tokens at once, at least: their products read the whole weight, and fewer are up to a tenth slower


class LinearCrossEntropy:
    """logits = x wᵀ; y = Σ -log softmax(logits)[target], a float64 of shape (1,). Reads the loader's ``targets``.

    The forward pass makes the logits of some tokens at a time and, while it has them, both gradients: [tokens, vocab]
    never exists, and nothing is computed twice (as in Liger Kernel, Hsu et al. 2024). So it is the forward pass that
    accumulates the gradient of this weight; when ``key`` says that nobody trains, it leaves it alone. The gradients
    carry ``scale`` = 1 / (tokens of the whole step): those of a step sum up to those of its mean loss.
    """

    def __init__(self, width: int, vocab: int, scale: float, std: float = 0.02, block: int = BLOCK) -> None:
        self.scale, self.vocab, self.block = scale, vocab, block
        self.params = {"weight": matrix(vocab, width, std)}

    def forward(self, ops: Ops, p: Mapping[str, Tensor], x: Any) -> tuple[Any, Saved]:
        tokens = x.shape[0]
        targets, key = ops.input("targets", (tokens,), "i"), ops.input("key", (4,), "l")
        blocks = max(1, tokens // max(self.block // self.vocab, FEWEST))
        w = p["weight"]
        loss, _, dx, _ = ops.linearcrossentropy_fwd(
            ops.gradient(w), x, w, targets, key, r=-(-tokens // blocks), scale=self.scale
        )
        return loss, dx

    def grad_input(self, ops: Ops, p: Mapping[str, Tensor], dy: None, saved: Saved) -> tuple[Any, Saved]:
        return saved, None

    def grad_weight(self, ops: Ops, g: Mapping[str, Tensor], owed: Saved) -> None:
        """Nothing is owed."""
