"""What the slots of a model take on this machine: each kind (embed, a layer, head) is run alone, before the cut."""

from __future__ import annotations

from time import perf_counter
from typing import Any

from hpcpipe.backends.null import PASSES, Pass
from hpcpipe.comm.local import LocalWorld
from hpcpipe.config import Config
from hpcpipe.planner import slots
from hpcpipe.planner.costs import Cost
from hpcpipe.planner.slots import Slot
from hpcpipe.runtime import arena
from hpcpipe.runtime.executor import Executor, Stage
from hpcpipe.schedule import program
from hpcpipe.schedule.program import POOLS, Instruction

ROUNDS = 4  # the first one meets cold memory and is not counted


def prices(config: Config, backend: Any) -> dict[str, Cost]:
    """Seconds of F, B and W of each kind of slot of a resolved config, for one microbatch."""
    return {kind: _price(slot, backend) for kind, slot in slots.alone(config, slots.chain(config)).items()}


def _price(slot: Slot, backend: Any) -> Cost:
    """A stage of its own, on zeros: what a pass takes does not depend on the numbers."""
    recording, params = slot.recording, arena.parameters({0: slot.layer}, {}, 1)
    inputs = arena.input_offsets([(0, recording)])
    layout = arena.layout(recording, params, inputs[0], backend.real, on_device=backend.on_device)
    counts = {(0, pool): 1 for pool in POOLS}
    memory = arena.arrange(
        {0: layout}, counts, params, inputs, 1, 0, backend.threads, backend.real, half=bool(recording.halves),
        on_device=backend.on_device,
    )
    executor = Executor(memory, {0: Stage(recording, layout)}, backend, LocalWorld(1).links[0])
    key = executor.input("key", 0)
    if key is not None:
        key[3] = 1  # as in training: dropout drops, the loss makes its gradients
    executor.upload()
    bases = executor.bases(Instruction("F", 0, 0, tuple(program.Slot(0, pool, 0) for pool in POOLS)))

    def seconds(name: Pass) -> float:
        begin = perf_counter()
        backend.run(executor.passes[0, name], executor.arena, bases, memory.work)
        return perf_counter() - begin

    rounds = [[seconds(name) for name in PASSES] for _ in range(ROUNDS)]
    if backend.on_device:
        backend.forget(executor.arena)
    return Cost(*(min(column) for column in zip(*rounds[1:], strict=True)))
