"""What a backend is, and the choice of one by name. Each is imported only when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from hpcpipe.backends.null import Call, Tensor
from hpcpipe.config import UserError


class Backend(Protocol):
    """Executes recordings over one arena. ``real`` is the size in bytes of the element type "r".

    ``level`` names the instructions that its kernels use: two backends give the same bits only on the same level.
    """

    name: str
    level: str
    real: int
    threads: int

    def allocate(self, nbytes: int) -> Any:
        """One zeroed block of device memory, the rank's arena."""

    def array(self, memory: Any, offset: int, shape: tuple[int, ...], type: str) -> Any:
        """A view of the arena (``type``: r, i, l or d) at a byte offset."""

    def compile(self, calls: Sequence[Call], where: Callable[[Tensor], tuple[int, int]]) -> Any:
        """A recorded pass, ready to run; ``where`` gives (region, byte offset) of each tensor."""

    def run(self, handle: Any, memory: Any, bases: Any, work: int) -> None:
        """Executes a compiled pass; a tensor lies at memory + bases[region] + offset, scratch at ``work``."""

    def bound(self, handle: Any, memory: Any, bases: Any, work: int) -> Callable[[], None]:
        """``run``, prepared: the operands stay where they are, and what they hold may change."""

    def matmul_peak(self, seconds: float) -> float:
        """FLOP/s of float32 matrix products on this device, measured now for about ``seconds``."""


def open_backend(name: str, threads: int) -> Backend:
    """The backend of a config's ``device.backend``; UserError where its library is missing or does not fit."""
    if name == "reference":
        from hpcpipe.backends.reference import ReferenceBackend

        return ReferenceBackend("float32")
    from hpcpipe.backends.cpu import CpuBackend

    try:
        return CpuBackend(threads)
    except RuntimeError as error:
        raise UserError(f"device.backend: {error}") from None
