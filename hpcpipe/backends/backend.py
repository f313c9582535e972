"""What a backend is, and the choice of one by name. Each is imported only when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from hpcpipe.backends.null import Call, Tensor
from hpcpipe.config import UserError


class Backend(Protocol):
    """Executes recordings over one arena. ``real`` is the size in bytes of the element type "r". One that is
    ``on_device`` works while the host goes on, and its arena is not host memory (see ``cuda.backend``).

    ``level`` names the instructions that its kernels use: two backends give the same bits only on the same level.
    """

    name: str
    level: str
    real: int
    threads: int
    on_device: bool

    def allocate(self, nbytes: int) -> Any:
        """One zeroed block of device memory, the rank's arena."""

    def array(self, memory: Any, offset: int, shape: tuple[int, ...], type: str) -> Any:
        """A view of the arena (``type``: r, h, i, l or d) at a byte offset."""

    def mirror(self, memory: Any, offset: int, nbytes: int) -> tuple[Any, Callable[[], None]]:
        """Host bytes that stand for a part of the arena, and what sends them there."""

    def host(self, array: Any) -> Any:
        """The values on the host, of an array that does not change now; for a thread beside the steps, too."""

    def load(self, array: Any, read: Callable[[Any], Any]) -> None:
        """Fills an array with what ``read`` writes into the host array that it is given."""

    def compile(
        self,
        calls: Sequence[Call],
        where: Callable[[Tensor], tuple[int, int]],
        brief: Collection[int] = (),
        whole: Collection[int] = (),
    ) -> Any:
        """A recorded pass, ready to run; ``where`` gives (region, byte offset) of each tensor. Nobody needs the tensors
        with the numbers ``brief`` after the pass: one of them may be left out where two calls become one. What touches
        one of ``whole`` is multiplied in the compute type, where other products may be narrower.
        """

    def run(self, handle: Any, memory: Any, bases: Any, work: int) -> None:
        """Executes a compiled pass; a tensor lies at memory + bases[region] + offset, scratch at ``work``."""

    def bound(self, handle: Any, memory: Any, bases: Any, work: int) -> Callable[[], None]:
        """``run``, prepared: the operands stay where they are, and what they hold may change."""

    def matmul_peak(self, seconds: float) -> float:
        """FLOP/s of float32 matrix products on this device, measured now for about ``seconds``."""


def open_backend(name: str, threads: int, index: int = 0, compute: str = "float32") -> Any:
    """The backend of a config's ``device.backend``; UserError where its library is missing or does not fit.

    ``index`` is CUDA's number of the GPU, ``compute`` what products multiply; the others have neither.
    """
    if name == "reference":
        from hpcpipe.backends.reference import ReferenceBackend

        return ReferenceBackend("float32")
    if name == "cuda":
        from hpcpipe.backends.cuda import opening

        return opening.open_cuda(index, compute)
    from hpcpipe.backends.cpu import CpuBackend

    try:
        return CpuBackend(threads)
    except RuntimeError as error:
        raise UserError(f"device.backend: {error}") from None
