"""Embedding: where a model starts, from token ids to the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcpipe.layers.layer import Ops, Saved, Tensor, matrix


class Embedding:
    """y = w[ids], plus one learned row per position when ``positions`` > 0 (GPT-2). Reads the loader's ``ids``.

    ``tokens`` rows enter, the concatenation of sequences of ``length`` tokens. There is no input gradient.
    """

    def __init__(self, vocab: int, width: int, tokens: int, length: int, positions: int = 0, std: float = 0.02) -> None:
        self.tokens, self.length = tokens, length
        self.params = {"weight": matrix(vocab, width, std)}
        if positions:
            self.params["position"] = matrix(positions, width, std)

    def forward(self, ops: Ops, p: Mapping[str, Tensor], x: None) -> tuple[Any, Saved]:
        ids = ops.input("ids", (self.tokens,), "i")
        y = ops.embedding_fwd(ids, p["weight"])
        if "position" in p:
            y = ops.position_fwd(y, p["position"], t=self.length)
        return y, ids

    def grad_input(self, ops: Ops, p: Mapping[str, Tensor], dy: Any, saved: Saved) -> tuple[None, Saved]:
        return None, (dy, saved)

    def grad_weight(self, ops: Ops, g: Mapping[str, Tensor], owed: Saved) -> None:
        dy, ids = owed
        ops.embedding_dw(g["weight"], dy, ids)
        if "position" in g:
            ops.position_dw(g["position"], dy, t=self.length)
