"""What a layer is: three passes over handles, and a table of the parameters it has.

    forward(ops, p, x)            -> y,  saved    what grad_input will need
    grad_input(ops, p, dy, saved) -> dx, owed     what grad_weight will need, and nothing more
    grad_weight(ops, g, owed)     -> None         g += ...

``p`` and ``g`` map the layer's own parameter names to tensors. Parameter gradients accumulate, activation gradients
are returned. A layer that starts a model gets x = None and returns dx = None; one that ends in a loss gets dy = None.
A layer holds sizes, never an array, and calls kernels by name on ``ops``: it knows no rank, no device and no library.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

Ops = Any  # every kernel of the table as a method, ``input(name, shape, type)`` for what the data loader provides, and
# ``gradient(tensor)``: a parameter's, for a layer that has it ready in ``forward``
Saved = Any  # a tree of tensors (or nothing) that only the layer itself reads
Init = tuple[str] | tuple[str, float]  # ("normal", standard deviation), ("zeros",) or ("ones",)


class Tensor(Protocol):
    """A handle: activations are [tokens, channels], weights [out, in]."""

    @property
    def shape(self) -> tuple[int, ...]: ...


class ParamSpec(NamedTuple):
    """One parameter: its shape, how it starts, and whether AdamW decays it (matrices yes; norms and biases no)."""

    shape: tuple[int, ...]
    init: Init
    decay: bool


class Layer(Protocol):
    """The three passes. ``params`` is in the order in which the forward pass meets them."""

    @property
    def params(self) -> Mapping[str, ParamSpec]: ...

    def forward(self, ops: Ops, p: Mapping[str, Tensor], x: Any) -> tuple[Any, Saved]: ...

    def grad_input(self, ops: Ops, p: Mapping[str, Tensor], dy: Any, saved: Saved) -> tuple[Any, Saved]: ...

    def grad_weight(self, ops: Ops, g: Mapping[str, Tensor], owed: Saved) -> None: ...


def matrix(rows: int, columns: int, std: float) -> ParamSpec:
    """A decayed [rows, columns] weight that starts normal with this standard deviation."""
    return ParamSpec((rows, columns), ("normal", std), True)


def vector(size: int, start: str) -> ParamSpec:
    """An undecayed [size] scale ("ones") or shift ("zeros")."""
    return ParamSpec((size,), (start,), False)


def own(tensors: Mapping[str, Tensor], prefix: str, layer: Layer) -> dict[str, Tensor]:
    """The part of a parent's parameters that belongs to ``layer``, under the layer's own names."""
    return {name: tensors[prefix + name] for name in layer.params}
