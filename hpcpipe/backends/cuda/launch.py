"""What one kernel call becomes on a GPU: a few launches, each with its grid and arguments; plain data, no device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from hpcpipe.backends.cuda.driver import Properties
from hpcpipe.backends.null import Call

Size = tuple[int, int, int]


class Launch(NamedTuple):
    """One launch of an entry of native/cuda. An int argument is an address or an int64_t, a float is a float."""

    entry: str
    grid: Size
    block: Size
    args: tuple[int | float, ...]
    shared: int = 0  # bytes of dynamic shared memory


class Site(NamedTuple):
    """A call where it is going to happen: addresses by the table's names (0 for an absent one) and the device.

    ``half``: whether the compute type (the table's "a") is bfloat16 here; ``work`` is room for what the table's
    ``device`` expression says.
    """

    call: Call
    at: Mapping[str, int]
    half: bool
    work: int
    device: Properties

    @property
    def size(self) -> dict[str, int]:
        """The bound dimension letters and integers."""
        return self.call.env

    @property
    def reals(self) -> dict[str, float]:
        return dict(zip(self.call.row.reals, self.call.reals, strict=True))

    @property
    def args(self) -> tuple[int | float, ...]:
        """All arguments in the order of the table: addresses, dims, ints, reals."""
        addresses = (self.at[arg.name] for arg in self.call.row.buffers)
        return (*addresses, *self.call.ints, *self.call.reals)

    @property
    def entry(self) -> str:
        """The entry that is the twin of the C kernel, for the compute type of this call."""
        return f"hp_{self.call.kernel}{'_h' if self.half else ''}"


Launcher = Callable[[Site], Sequence[Launch]]
