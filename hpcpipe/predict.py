"""A trained model in one process, forward only: what ``generate`` asks for its next token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hpcpipe import model
from hpcpipe.backends.backend import open_backend
from hpcpipe.backends.null import record
from hpcpipe.checkpoint.read import Checkpoint
from hpcpipe.comm.local import LocalWorld
from hpcpipe.config import DeviceConfig, ModelConfig, UserError, loads
from hpcpipe.data import TOKENIZER
from hpcpipe.runtime import arena
from hpcpipe.runtime.executor import Executor, Stage
from hpcpipe.schedule.program import POOLS, Instruction, Slot


def open_predictor(path: str, tokens: int) -> tuple[Predictor, Path]:
    """A model from a checkpoint or run folder, for texts of up to ``tokens`` tokens, and its tokenizer's file."""
    checkpoint = Checkpoint.open(path)
    config = loads(str(checkpoint.attributes["config"]), f"the config in {checkpoint.path}")
    length = min(config.model.context, -(-max(tokens, 1) // 64) * 64)
    predictor = Predictor(checkpoint, config.model, length, _backend(config.device))
    return predictor, checkpoint.path.parent / TOKENIZER


def _backend(device: DeviceConfig) -> Any:
    """What the model was trained on, or the CPU: a checkpoint may be looked at where there is no GPU."""
    try:
        return open_backend(device.backend, device.threads)
    except UserError:
        if device.backend != "cuda":
            raise
        return open_backend("cpu", device.threads)


class Predictor:
    """The logits of one sequence. Weights are read from any checkpoint, whatever the layout it was written on."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, length: int, backend: Any) -> None:
        """``length`` is the longest sequence that will be asked for; every call costs a forward pass over as many."""
        self.length = length
        chain = model.chain(config, 1, self.length, scale=1.0, logits=True)
        recording = record(chain, None, backward=False)
        params = arena.parameters({0: chain}, model.ties(config), 1)
        inputs = arena.input_offsets([(0, recording)])
        places = arena.layout(recording, params, inputs[0], backend.real, on_device=backend.on_device)
        memory = arena.arrange(
            {0: places}, {(0, pool): 1 for pool in POOLS}, params, inputs, 1, 0, backend.threads, backend.real
        )
        self.executor = Executor(memory, {0: Stage(recording, places)}, backend, LocalWorld(1).links[0])
        for name in params.owned:
            view = self.executor.array("PARAM", backend.real * params.param[name], params.shapes[name])
            backend.load(view, lambda values, name=name: checkpoint.read("parameter", name, values))
        slots = tuple(Slot(0, pool, 0) for pool in POOLS)
        self.bases = self.executor.bases(Instruction("F", 0, 0, slots))
        self.ids: Any = self.executor.input("ids", 0)
        self.logits = backend.array(self.executor.arena, memory.base(0, "Y", 0), recording.y.shape, "r")

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """Logits (tokens, vocab) of up to ``length`` token numbers; a position sees itself and what stands before.

        A view that the next call overwrites.
        """
        executor = self.executor
        self.ids[:] = 0
        self.ids[: len(ids)] = ids
        executor.upload()
        executor.backend.run(executor.passes[0, "F"], executor.arena, self.bases, executor.memory.work)
        return np.asarray(self.logits[: len(ids)])
