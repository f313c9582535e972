"""Every kernel of a step on one GPU: its time, its bytes/s beside a plain copy of as many bytes, its FLOP/s.

The recorded passes of a microbatch are taken apart: all calls of one kernel and one size become one graph, so that the
operands are those of training, layer after layer, and larger than the caches; libraries take what they take in
training, except pairs that they fuse, which the rows of whole passes contain. Norm, update and a large product follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from benchmarks.peer_hpcpipe import prepared
from benchmarks.shape import Job, Shape, parse, synthetic_tokens
from hpcpipe.backends.cuda import opening
from hpcpipe.backends.null import PASSES, Call, Tensor

# Widths of GPT-2 1.5B and of a Llama 1B; a few layers are enough.
SHAPES = {"gpt2": parse("4,25,1600,1024,8,50304"), "llama": parse("4,32,2048,4096,2,32000,4")}
TOYS = {"gpt2": parse("1,2,16,8,2,32"), "llama": parse("1,2,16,8,2,32,1")}
ROUNDS, SPAN = 5, 2e-3  # of each row; seconds that one round takes, about
MOST = 100  # repetitions in a round
COPIED = 1 << 29  # bytes that copies go through, far more than caches hold
STEP_BYTES = {"norm": 4, "update": 34}  # per parameter: g; p, g, m, v both ways and the bfloat16 copy


class Row(NamedTuple):
    """One line: seconds, bytes and FLOPs of one call, and seconds of a copy of as many bytes (0: not compared)."""

    name: str
    sizes: str
    calls: int
    seconds: float
    bytes: float
    flops: float
    copy: float


class Bench:
    """A prepared run of a shape and what times its parts."""

    def __init__(self, shape: Shape, compute: str, toy: bool) -> None:
        job = Job(shape, {}, synthetic_tokens(shape, 1))
        self.training = prepared(job, shape.sequences, "cuda", compute)
        self.backend, self.executor, self.toy = self.training.backend, self.training.executor, toy
        self.size = 1 << 16 if toy else COPIED
        self.room = self.backend.allocate(self.size)

    def seconds(self, work: Callable[[], None]) -> float:
        """Of one repetition: the median of a few rounds, by the device's clock."""
        backend, seconds = self.backend, self.backend.driver.seconds
        begin, end = backend.event(), backend.event()

        def once(count: int) -> float:
            backend.record(begin)
            for _ in range(count):
                work()
            backend.record(end)
            backend.settle()
            return float(seconds(begin, end)) / count

        once(1)  # captures, and meets cold memory
        count = 1 if self.toy else max(1, min(MOST, round(SPAN / max(once(1), 1e-9))))
        return median(once(count) for _ in range(1 if self.toy else ROUNDS))

    def copy(self, nbytes: float, calls: int) -> float:
        """Seconds of one device copy that reads and writes ``nbytes`` together, ``calls`` of them in one graph."""
        driver, stream = self.backend.driver, self.backend.streams.compute
        each = min(max(16, int(nbytes) // 2 // 16 * 16), self.size // 2)
        places = list(range(0, self.size - 2 * each + 1, 2 * each))
        driver.begin_capture(stream)
        for i in range(calls):
            at = self.room.address + places[i % len(places)]
            driver.copy(at + each, at, each, stream)
        graph = driver.end_capture(stream)
        took = self.seconds(lambda: driver.launch_graph(graph, stream)) / calls
        return took * (nbytes / (2 * each))

    def rows(self) -> Iterator[Row]:
        """All kernels, then whole passes, norm and update."""
        for (name, sizes), calls in self._groups().items():
            flops, moved = calls[0][0].flops, float(calls[0][0].nbytes)
            took = self.seconds(self._bound([call for call, _ in calls], calls[0][1])) / len(calls)
            yield Row(name, sizes, len(calls), took, moved, flops, self.copy(moved, len(calls)))
        for name, instruction in self._instructions():
            recording = self.executor.stages[instruction.stage].recording
            took = self.seconds(self._bound(recording.passes[name], instruction))
            yield Row(f"pass {name}", "", 1, took, recording.nbytes(name), recording.flops(name), 0.0)
        yield from self._optimizer()

    def _instructions(self) -> list[tuple[Any, Any]]:
        program = self.training.program.instructions
        found = [(name, next((i for i in program if i.kind == name), None)) for name in PASSES]
        stages = self.executor.stages
        return [(name, i) for name, i in found if i is not None and stages[i.stage].recording.passes[name]]

    def _groups(self) -> dict[tuple[str, str], list[tuple[Call, Any]]]:
        """The calls of the first microbatch by kernel and size, each with its instruction."""
        groups: dict[tuple[str, str], list[tuple[Call, Any]]] = {}
        for name, instruction in self._instructions():
            for call in self.executor.stages[instruction.stage].recording.passes[name]:
                sizes = " ".join(f"{k}={v}" for k, v in call.env.items() if k != "salt")
                groups.setdefault((call.kernel, sizes), []).append((call, instruction))
        return groups

    def _bound(self, calls: Sequence[Call], instruction: Any) -> Callable[[], None]:
        where = self.executor.stages[instruction.stage].layout.where
        handle = self.backend.compile(calls, lambda t: where[t.id])
        bases, work = self.executor.bases(instruction), self.executor.memory.work
        run: Callable[[], None] = self.backend.bound(handle, self.executor.arena, bases, work)
        return run

    def _optimizer(self) -> Iterator[Row]:
        optimizer, count = self.training.optimizer, self.training.mine.params.size
        squares = np.zeros(len(self.training.plan.names))
        works = {"norm": lambda: optimizer.squares(squares), "update": lambda: optimizer.update(0, 1e-4, 1.0)}
        for name, work in works.items():
            moved = float(STEP_BYTES[name] * count)
            yield Row(f"{name} of all parameters", f"n={count}", 1, self.seconds(work), moved, 0.0, self.copy(moved, 1))

    def product(self) -> Row:
        """A square product of random numbers, the usual yardstick of a device."""
        side, backend = opening.SIDE, self.backend
        y, x, w = (Tensor(i, (side, side), "h") for i in range(3))
        memory = backend.allocate(6 * side * side)
        rng = np.random.default_rng(1)
        for t in (x, w):
            numbers = rng.standard_normal((side, side), np.float32)
            backend.array(memory, 2 * side * side * t.id, t.shape, "h")[...] = numbers.view(np.uint32) >> 16
        call = Call("linear_fwd", (y, x, w, None, None), (side, side, side), ())
        handle = backend.compile([call], lambda t: (0, 2 * side * side * t.id))
        took = self.seconds(backend.bound(handle, memory, np.zeros(1, np.int64), 6 * side * side))
        backend.forget(memory)
        return Row("linear_fwd", f"n=o=c={side}", 1, took, float(call.nbytes), call.flops, 0.0)


def roofline(compute: str, quick: bool, toy: bool = False) -> dict[str, Any]:
    """The rows of all shapes, and the large product."""
    shapes = TOYS if toy else SHAPES
    found: dict[str, Any] = {"compute": compute, "shapes": {}, "rows": {}}
    for name, shape in list(shapes.items())[: 1 if quick else None]:
        bench = Bench(shape, compute, toy)
        found["shapes"][name] = str(shape)
        found["rows"][name] = [row._asdict() for row in bench.rows()]
        found["product"] = found.get("product") or bench.product()._asdict()
        found["chosen"] = [*found.get("chosen", []), *bench.training.chosen]
    return found


def table(found: Mapping[str, Any], peak: float | None, toy: bool) -> list[str]:
    """The rows in lines; ``peak`` in FLOP/s."""
    lines = []
    product = found["product"]
    if not toy:
        lines.append(f"a product {product['sizes']}: {product['flops'] / product['seconds'] / 1e12:.0f} TFLOP/s")
    for name, rows in found["rows"].items():
        lines.append(f"{name} {found['shapes'][name]}, {found['compute']}, calls of one microbatch")
        lines.append(f"{'':28} {'calls':>5} {'us':>9} {'GB/s':>7} {'of copy':>8} {'TFLOP/s':>8} {'of peak':>8}  sizes")
        lines += [_line(row, peak, toy) for row in rows]
    return lines + sorted(set(found["chosen"]))


def _line(row: Mapping[str, Any], peak: float | None, toy: bool) -> str:
    if toy:
        return f"{row['name']:28} {row['calls']:>5} rehearsed  {row['sizes']}"
    seconds = row["seconds"]
    copy = f"{row['copy'] / seconds:8.0%}" if row["copy"] else f"{'':8}"
    share = f"{row['flops'] / seconds / peak:8.1%}" if peak and row["flops"] else f"{'':8}"
    return (
        f"{row['name']:28} {row['calls']:>5} {1e6 * seconds:>9.1f} {row['bytes'] / seconds / 1e9:>7.0f} {copy} "
        f"{row['flops'] / seconds / 1e12:>8.1f} {share}  {row['sizes']}"
    )
