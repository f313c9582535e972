"""A plan for people: the table per rank and the predicted timeline."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

from hpcpipe import model
from hpcpipe.config import Config, UserError
from hpcpipe.data import MANIFEST, Dataset
from hpcpipe.placement.cores import allowed
from hpcpipe.planner.plan import Plan, plan, resolve
from hpcpipe.schedule import picture
from hpcpipe.schedule.op import KINDS, ScheduleError
from hpcpipe.schedule.timeline import Timeline, draw
from hpcpipe.trace import write

MEASURED, PREDICTED = "timeline.jsonl", "predicted.jsonl"  # of a run's last step


def describe(config: Config, ranks: int = 0, width: int = 96, svg: str = "", trace: str = "") -> str:
    """What ``hpcpipe plan`` prints for ``ranks`` ranks (0: as many as the config names, at least one).

    The predicted timeline is also written to the files ``svg`` and ``trace``, if named.
    """
    if ranks < 0:
        raise UserError(f"plan: --ranks is {ranks}, expected 1 or more, or 0 for as many as the config names")
    path = config.data.path
    vocab = Dataset.open(path).vocab if path and (Path(path) / MANIFEST).exists() else 0
    ranks = ranks or (config.pipeline.ranks or 1) * (config.pipeline.replicas or 1)
    threads = config.device.threads or max(1, len(allowed()) // ranks)
    found = plan(resolve(config, vocab), ranks, threads)
    _draw("plan", {"predicted": found.timeline}, svg)
    if trace:
        write(Path(trace), None, found.timeline, flops(found))
    return "\n".join(_lines(found, threads, width))


def flops(p: Plan) -> dict[tuple[str, int], float]:
    """FLOPs of one microbatch by kind of op and stage, as recorded."""
    return {
        (kind, s): p.stages[s % p.schedule.depth].recording.flops(kind)
        for s in range(p.schedule.stages)
        for kind in KINDS
    }


def _lines(p: Plan, threads: int, width: int) -> list[str]:
    c = p.config
    m, t = c.model, c.train
    count = model.parameter_count(m)
    seat = f"a GPU in {t.compute}" if c.device.backend == "cuda" else f"{threads} threads"
    lines = [
        (
            f"{m.family}: {m.layers} layers, {m.heads} heads ({m.kv_heads} kv), width {m.width}, ffn {m.ffn}, "
            f"vocabulary {m.vocab}, {count:,} parameters"
        ),
        (
            f"{len(p.stages)} stages x {p.replicas} replicas, {seat} each; {t.batch} sequences of "
            f"{t.length} tokens per step in {p.micros} microbatches of {t.microbatch} per replica"
        ),
        f"{p.flops / 1e9:,.2f} GFLOP per step, {p.flops / p.tokens / 1e6:,.3f} MFLOP per token",
        "",
        f"{'stage':>5} {'slots':<24} {'parameters':>13} {'F':>9} {'B':>9} {'W':>9}  GFLOP per microbatch",
    ]
    for i, stage in enumerate(p.stages):
        own = [name for name in stage.layer.params if name not in p.ties]
        size = sum(prod(stage.layer.params[name].shape) for name in own)
        flops = [stage.recording.flops(name) / 1e9 for name in "FBW"]
        lines.append(f"{i:>5} {_span(stage.slots):<24} {size:>13,} " + " ".join(f"{f:>9.3f}" for f in flops))
    uses = list(dict.fromkeys(use for rank in p.ranks for use in rank.memory.by_use()))
    lines += [
        "",
        "MiB per rank, exactly what is allocated:",
        "  rank " + " ".join(f"{u:>11}" for u in uses) + f" {'in all':>11}",
    ]
    for i, rank in enumerate(p.ranks):
        parts = rank.memory.by_use()
        sizes = [parts.get(use, 0) for use in uses] + [rank.memory.total]
        lines.append(f"  {i:>4} " + " ".join(f"{size / 2**20:>11.2f}" for size in sizes))
    if c.pipeline.cut == "measured":
        lines += ["", "the cut is by the roofline here; a run measures the slots and may cut elsewhere"]
    if p.early:
        lines += ["", "the update does not wait for the norm of the whole gradient (optimizer.early)"]
    lines += ["", f"schedule {c.pipeline.schedule}, predicted bubble {p.timeline.bubble:.1%}", draw(p.timeline, width)]
    return lines


def _span(slots: tuple[str, ...]) -> str:
    return slots[0] if len(slots) == 1 else f"{slots[0]} … {slots[-1]}"


def timeline(path: str, width: int = 96, svg: str = "", trace: str = "") -> str:
    """What ``hpcpipe inspect run/timeline.jsonl`` prints: a measured step, drawn like a predicted one.

    Pictures also show what was predicted, above it, where the run left ``predicted.jsonl`` beside it.
    """
    file = Path(path)
    found = _read(file)
    if svg or trace:
        beside = file.with_name(PREDICTED)
        measured = found if file != beside else None
        predicted = found if file == beside else _read(beside) if beside.exists() else None
        named = {"predicted": predicted, "measured" if file.name == MEASURED else file.stem: measured or found}
        _draw("inspect", {name: each for name, each in named.items() if each}, svg)
        if trace:
            write(Path(trace), measured, predicted)
    idle = "  ".join(f"rank {r} {found.idle(r):.4f} s" for r in range(found.ranks))
    lines = [f"{len(found.events)} ops, {found.makespan:.4f} s, bubble {found.bubble:.1%}; idle: {idle}"]
    return "\n".join([*lines, draw(found, width)])


def _read(path: Path) -> Timeline:
    """The timeline in a file."""
    try:
        found = Timeline.from_jsonl(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"inspect: {path} cannot be read ({error.strerror}); give a run's timeline.jsonl") from None
    except (ScheduleError, UnicodeDecodeError) as error:
        raise UserError(f"inspect: {path} is not a timeline ({error}); give a run's timeline.jsonl") from None
    if not found.events:
        raise UserError(f"inspect: {path} holds no events; give the timeline.jsonl of a run that did a step")
    return found


def _draw(verb: str, timelines: Mapping[str, Timeline], svg: str) -> None:
    """Writes the picture that a person asked for: a file name, empty for none."""
    try:
        if svg:
            Path(svg).write_text(picture.svg(timelines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{verb}: {svg} cannot be written ({error.strerror}); choose another file") from None
