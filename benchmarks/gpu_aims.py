"""The aims of the GPU path, each with what it wants, what was measured, and whether it is met.

In: what the parts of ``benchmarks.gpu`` found, by part. An aim without its numbers is "not measured", never met.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from benchmarks.gpu_curves import SAME
from benchmarks.gpu_steps import OURS

LARGE, ENOUGH = 16 << 20, 256 << 20  # bytes of a call, of all calls of a row: what no cache holds
SAME_BITS = "test_two_ranks_share_a_device_to_the_bit"
Found = Mapping[str, Any]


class Aim(NamedTuple):
    """``measure`` gives a number or nothing; it must be at least ``least`` and at most ``most``."""

    what: str
    measure: Callable[[Found], float | None]
    least: float = float("-inf")
    most: float = float("inf")
    form: str = ".2f"

    @property
    def wanted(self) -> str:
        bounds = [("at least", self.least), ("at most", self.most)]
        return " and ".join(f"{word} {value:{self.form}}" for word, value in bounds if abs(value) < float("inf"))


class Judged(NamedTuple):
    """One line of the table."""

    what: str
    wanted: str
    measured: str
    verdict: str  # met, not met, not measured


def judged(found: Found) -> list[Judged]:
    """All aims."""
    lines = []
    for aim in AIMS:
        value = aim.measure(found)
        met = value is not None and aim.least <= value <= aim.most
        verdict = "not measured" if value is None else "met" if met else "not met"
        lines.append(Judged(aim.what, aim.wanted, "" if value is None else f"{value:{aim.form}}", verdict))
    return lines


def table(lines: Sequence[Judged]) -> list[str]:
    """The aims in lines of text."""
    rows = [("aim", "wanted", "measured", ""), *lines]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


# --- what is looked up


def _run(found: Found, shape: str, name: str) -> Found:
    """One contestant on one shape; nothing where it did not run to its end."""
    runs: Found = found.get(shape, {}).get("runs", {})
    return next((run for who, run in runs.items() if who.startswith(name)), {})


def _faster(shape: str, peer: str) -> Callable[[Found], float | None]:
    """How much faster hpcpipe is than a peer: the median of the rounds' ratios."""

    def measure(found: Found) -> float | None:
        run = _run(found, shape, peer)
        return median(run["ratio"]) if run.get("ratio") and run.get("agrees") else None

    return measure


def _of_ours(shape: str, key: str) -> Callable[[Found], float | None]:
    def measure(found: Found) -> float | None:
        values = _run(found, shape, OURS).get(key)
        return 100 * median(values) if values else None

    return measure


def _narrow(found: Found) -> float | None:
    """FP8 beside bfloat16, tokens/s, where both learn the same."""
    run = _run(found, "gpt2-1.5B", "hpcpipe:fp8")
    return 1 / median(run["ratio"]) if run.get("ratio") and run.get("agrees") else None


def _apart(pair: str) -> Callable[[Found], float | None]:
    def measure(found: Found) -> float | None:
        value = found.get("curves", {}).get("apart", {}).get(pair)
        return None if value is None else 100 * value

    return measure


def _slowest(found: Found) -> float | None:
    """Of the kernels that bytes bound, the least share of a copy's speed; those of products and attention are not."""
    rows = [row for rows in found.get("kernels", {}).get("rows", {}).values() for row in rows]
    shares = [row["copy"] / row["seconds"] for row in rows if row["copy"] and _moves(row)]
    return 100 * min(shares) if shares else None


def _moves(row: Mapping[str, Any]) -> bool:
    large = row["bytes"] >= LARGE and row["bytes"] * row["calls"] >= ENOUGH
    return large and not row["name"].startswith(("linear", "attention"))


def _bits(found: Found) -> float | None:
    """1 where two ranks on one GPU gave the bits of one."""
    tests = found.get("check", {}).get("tests", {})
    outcomes = [outcome for name, outcome in tests.items() if name.startswith(SAME_BITS)]
    return None if not outcomes or "skipped" in outcomes else float(all(o == "passed" for o in outcomes))


def _failed(found: Found) -> float | None:
    tests = found.get("check", {}).get("tests", {})
    return float(sum(o == "failed" for o in tests.values())) if any(o == "passed" for o in tests.values()) else None


def _clean(found: Found) -> float | None:
    return {"passed": 0.0, "failed": 1.0}.get(found.get("sanitizer", {}).get("outcome", ""))


AIMS = (
    Aim("kernels, runs and libraries: failed tests", _failed, most=0, form=".0f"),
    Aim("two ranks on one GPU, staged: the bits of one (1: yes)", _bits, least=1, form=".0f"),
    Aim("compute-sanitizer, memcheck and racecheck: failed", _clean, most=0, form=".0f"),
    Aim("loss curve, bfloat16 beside float32: % apart", _apart("bfloat16 beside float32"), most=100 * SAME),
    Aim("loss curve, FP8 beside bfloat16: % apart", _apart("fp8 beside bfloat16"), most=100 * SAME),
    Aim("tokens/s beside JAX, GPT-2 124M", _faster("gpt2-124M", "jax"), least=1.3),
    Aim("tokens/s beside PyTorch, GPT-2 124M", _faster("gpt2-124M", "torch"), least=1.15),
    Aim("tokens/s beside JAX, GPT-2 1.5B", _faster("gpt2-1.5B", "jax"), least=1.2),
    Aim("tokens/s beside PyTorch, GPT-2 1.5B", _faster("gpt2-1.5B", "torch"), least=1.1),
    Aim("% of the dense bfloat16 peak, GPT-2 1.5B", _of_ours("gpt2-1.5B", "mfu"), least=55, form=".1f"),
    Aim("% of a step without work on the stream, GPT-2 124M", _of_ours("gpt2-124M", "idle"), most=3, form=".1f"),
    Aim("% of a step without work on the stream, GPT-2 1.5B", _of_ours("gpt2-1.5B", "idle"), most=3, form=".1f"),
    Aim("FP8 beside bfloat16, GPT-2 1.5B, tokens/s", _narrow, least=1.25),
    Aim("% of a copy's speed, the slowest kernel that bytes bound", _slowest, least=85, form=".0f"),
)
