"""Where a number that is not finite came from: forward passes run once more, call by call, and looked at.

In: a rank's executor and program after a step whose loss was not finite; the run ends, so what is in the arena may be
overwritten. Out: one sentence about the first tensor, or nothing where this rank only passed on what it was given.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcpipe.backends.null import Call, Recording, Tensor
from hpcpipe.runtime.executor import Bound, Executor

PRODUCER = {"y": "output", "mean": "mean", "rstd": "deviation", "lse": "exponents", "nll": "loss of a token"}


def suspect(executor: Executor, program: Bound) -> str:
    """The first tensor of a forward pass on this rank that is not finite while all before it are; "" for none.

    Of each stage the microbatch is looked at that ran last: its input is still there.
    """
    last = {i.stage: i for i in program.instructions if i.kind == "F"}
    for stage, instruction in sorted(last.items()):
        recording, places = executor.stages[stage].recording, executor.stages[stage].layout.where
        bases = executor.bases(instruction)

        def finite(tensor: Tensor, bases: Any = bases, places: Any = places) -> bool:
            region, offset = places[tensor.id]
            return _finite(executor, int(bases[region]) + offset, tensor)

        if recording.x is not None and not finite(recording.x):
            continue
        op = f"F{stage}.{instruction.micro}"
        bad = next((name for name, tensor in recording.params.items() if not finite(tensor)), None)
        if bad:
            return f"before {op} the parameter {bad} is not finite"
        for call in recording.passes["F"]:
            handle = executor.backend.compile([call], lambda t, places=places: places[t.id])
            executor.backend.run(handle, executor.arena, bases, executor.memory.work)
            for arg, tensor in zip(call.row.buffers, call.buffers, strict=True):
                written = arg.role == "out" or (arg.role == "inout" and tensor not in recording.grads.values())
                if tensor is not None and written and not finite(tensor):
                    what = PRODUCER.get(arg.name, arg.name)
                    return f"in {op} the {what} of {call.kernel} {_where(recording, call)}is the first that is not"
    return ""


def _finite(executor: Executor, offset: int, tensor: Tensor) -> bool:
    if tensor.type not in ("r", "h", "d"):
        return True
    values = np.asarray(executor.backend.array(executor.arena, offset, tensor.shape, tensor.type))
    if tensor.type == "h":
        return not bool(((values & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(values).all())


def _where(recording: Recording, call: Call) -> str:
    """In which layer a call is: the parameter that it reads, or the last one that was read before it."""
    names = {t.id: name for group in (recording.params, recording.halves) for name, t in group.items()}
    last = ""
    for other in recording.passes["F"]:
        read = next((names[t.id] for t in other.buffers if t is not None and t.id in names), "")
        last = read or last
        if other is call:
            return f"with {read} " if read else f"after {last} " if last else ""
    return ""
