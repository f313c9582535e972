"""Layers made of layers: Chain, Residual and Recompute. A layer of layers is a layer, and so is a stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcpipe.layers.layer import Layer, Ops, ParamSpec, Saved, Tensor, own


class Chain:
    """One layer after another: ``Chain(first, second, norm=third, mlp=fourth)``.

    A keyword is the child's name and prefixes its parameters (``norm.weight``); a positional child keeps its names as
    they are. Positional children run first. Parameter names are checkpoint names, so two equal ones are a ValueError.
    """

    def __init__(self, *unnamed: Layer, **children: Layer) -> None:
        self.unnamed = unnamed
        self.children = children
        self.parts = (*(("", c) for c in unnamed), *((f"{name}.", c) for name, c in children.items()))
        self.params: dict[str, ParamSpec] = {}
        for prefix, child in self.parts:
            for name, spec in child.params.items():
                if prefix + name in self.params:
                    raise ValueError(f"Chain: two children have a parameter called {prefix + name}")
                self.params[prefix + name] = spec

    def forward(self, ops: Ops, p: Mapping[str, Tensor], x: Any) -> tuple[Any, Saved]:
        kept = []
        for prefix, child in self.parts:
            x, saved = child.forward(ops, own(p, prefix, child), x)
            kept.append(saved)
        return x, tuple(kept)

    def grad_input(self, ops: Ops, p: Mapping[str, Tensor], dy: Any, saved: Saved) -> tuple[Any, Saved]:
        owing = []
        for (prefix, child), mine in zip(reversed(self.parts), reversed(saved), strict=True):
            dy, owed = child.grad_input(ops, own(p, prefix, child), dy, mine)
            owing.append(owed)
        return dy, tuple(owing)

    def grad_weight(self, ops: Ops, g: Mapping[str, Tensor], owed: Saved) -> None:
        for (prefix, child), mine in zip(reversed(self.parts), owed, strict=True):
            child.grad_weight(ops, own(g, prefix, child), mine)


class Residual:
    """y = x + layer(x), with the layer's own parameter names."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.params = layer.params

    def forward(self, ops: Ops, p: Mapping[str, Tensor], x: Any) -> tuple[Any, Saved]:
        y, saved = self.layer.forward(ops, p, x)
        return ops.add_fwd(x, y), saved

    def grad_input(self, ops: Ops, p: Mapping[str, Tensor], dy: Any, saved: Saved) -> tuple[Any, Saved]:
        dx, owed = self.layer.grad_input(ops, p, dy, saved)
        return ops.add_fwd(dy, dx), owed

    def grad_weight(self, ops: Ops, g: Mapping[str, Tensor], owed: Saved) -> None:
        self.layer.grad_weight(ops, g, owed)


class Recompute:
    """Saves only x and runs the layer forward again inside ``grad_input``: the same kernels, so the same bits.

    (Chen, Xu, Zhang, Guestrin 2016.) Dropout repeats itself because its mask is a function of the key.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.params = layer.params

    def forward(self, ops: Ops, p: Mapping[str, Tensor], x: Any) -> tuple[Any, Saved]:
        y, _ = self.layer.forward(ops, p, x)
        return y, x

    def grad_input(self, ops: Ops, p: Mapping[str, Tensor], dy: Any, saved: Saved) -> tuple[Any, Saved]:
        _, again = self.layer.forward(ops, p, saved)
        return self.layer.grad_input(ops, p, dy, again)

    def grad_weight(self, ops: Ops, g: Mapping[str, Tensor], owed: Saved) -> None:
        self.layer.grad_weight(ops, g, owed)
