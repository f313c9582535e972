"""One plain HDF5 file of a checkpoint: real datasets where the master has virtual ones, which not all tools follow."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import h5py

from hpcpipe.checkpoint import inspect, layout, master
from hpcpipe.checkpoint.read import Checkpoint
from hpcpipe.config import UserError

ABOUT = """One training state, in one file. /parameters, /moment1 and /moment2 hold tensors by name: that of
layer.0.mlp.up.weight is /parameters/layer/0/mlp/up/weight. Arrays are row-major and little-endian; a linear layer
computes x @ weight.T, so its weight is [outputs, inputs]. The attributes are those of the checkpoint that it is of."""


def merge(path: str, out: str) -> Path:
    """Writes the whole state of a checkpoint, or of a run's newest, to the file ``out``; returns the step folder.

    Every part is held against its checksum first. A few MiB are held at once. UserError where something is damaged or
    cannot be written; nothing is left of a file that is not whole.
    """
    checkpoint, target = Checkpoint.open(path), Path(out)
    if wrong := checkpoint.verify():
        raise UserError(f"inspect: {checkpoint.path} is not merged: {wrong[0]}")
    if target.exists():
        raise UserError(f"inspect: {target} is there already; choose another name, nothing is replaced")
    part = target.with_name(f"{target.name}.part")
    try:
        with h5py.File(part, "w", libver=master.LIBVER) as file:
            for key, value in {**checkpoint.attributes, "about": ABOUT}.items():
                file.attrs[key] = value
            for (kind, name), tensor in checkpoint.layout.items():
                dataset = file.create_dataset(layout.path(kind, name), tensor.shape, tensor.dtype, track_times=False)
                dataset.attrs["name"] = name
                for box, values in inspect.stream(checkpoint, kind, name):
                    dataset[box] = values
        fd = os.open(part, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        part.replace(target)
    except (OSError, RuntimeError) as error:
        raise UserError(f"inspect: {target} cannot be written ({error}); nothing of it is left") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return checkpoint.path
