"""Whether narrow numbers learn what wide ones learn: one small GPT trained in each type on one GPU, loss by loss.

Weights, tokens and rates are the same; curves are compared by their means over tenths of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.peer_hpcpipe import loop, prepared
from benchmarks.shape import Job, initial_weights, parse, synthetic_tokens
from hpcpipe.config import UserError

SHAPE, TOY = parse("6,6,384,256,32,512"), parse("2,2,16,8,2,32")
STEPS, TOY_STEPS, PARTS = 300, 10, 10
SAME = 1e-2  # relative difference of means up to which two curves are the same
PAIRS = (("bfloat16", "float32"), ("fp8", "bfloat16"))  # the narrow one, what it is held against


def curves(toy: bool = False) -> dict[str, Any]:
    """Losses by type, the difference of each pair, and why a type is missing."""
    shape, steps = (TOY, TOY_STEPS) if toy else (SHAPE, STEPS)
    job = Job(shape, initial_weights(shape, 1), synthetic_tokens(shape, 2))
    losses: dict[str, list[float]] = {}
    missing: dict[str, str] = {}
    for compute in ("float32", "bfloat16", "fp8"):
        try:
            training = prepared(job, shape.sequences // 2, "cuda", compute)
        except UserError as error:
            missing[compute] = str(error)
            continue
        training.tell = lambda *_: None
        losses[compute] = loop(training)(0, steps)
    apart = {
        f"{narrow} beside {wide}": difference(losses[narrow], losses[wide])
        for narrow, wide in PAIRS
        if narrow in losses and wide in losses
    }
    return {"shape": str(shape), "steps": steps, "losses": losses, "apart": apart, "missing": missing}


def difference(narrow: Sequence[float], wide: Sequence[float]) -> float:
    """The largest relative difference of the curves' means over tenths; a NaN stays one."""
    a, b = (np.array([part.mean() for part in np.array_split(np.array(curve), PARTS)]) for curve in (narrow, wide))
    return float(np.abs(a / b - 1).max())


def table(found: dict[str, Any]) -> list[str]:
    """The ends of the curves and their differences, in lines."""
    lines = [f"{found['shape']}, {found['steps']} steps in each type"]
    lines += [f"  {name}: loss {c[0]:.4f} -> {np.mean(c[-10:]):.4f}" for name, c in found["losses"].items()]
    lines += [f"  {pair}: at most {apart:.2%} apart" for pair, apart in found["apart"].items()]
    return lines + [f"  {name} was not tried: {why}" for name, why in found["missing"].items()]
