"""The facts of ``inspect`` as aligned plain text: header, run, tree of tensors, table of shards, verdict.

Layers that are alike are shown once, as ``0-11``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

LABELS = {"parameter": "p", "moment1": "m1", "moment2": "m2"}
# Attributes that are told elsewhere, or not worth a line; and such as are told in full.
SHOWN = {"step", "loss", "tokens", "created", "host", "config", "about", "format", "layout"}
WHOLE = {"hardware"}
LEGEND = "kept: p = parameter, m1 and m2 = AdamW's moments; boxes = stored pieces of each"
SECTIONS = ("model", "train", "optimizer", "pipeline")


def text(facts: Mapping[str, Any]) -> str:
    """The whole report."""
    lines: list[str] = []
    if facts["run"]:
        lines += [*_run(facts["run"]), ""]
    if facts["checkpoint"]:
        lines += _checkpoint(facts["checkpoint"])
    return "\n".join(line.rstrip() for line in lines).rstrip()


def _run(run: Mapping[str, Any]) -> Iterator[str]:
    """The run folder: ended or not, its last metrics, its checkpoints."""
    yield f"run {run['path']}"
    if run["done"] is not None:
        yield "  ended well: " + (_pairs(run["done"]) or "yes")
    else:
        yield "  not ended (no done.json): still running, stopped or broken off"
    if run["metrics"]:
        yield "  last metrics: " + _pairs(run["metrics"])
    if not run["checkpoints"]:
        yield "  no checkpoint yet"
        return
    yield ""
    rows = [["checkpoint", "step", "loss", "tokens", "size", "shards", "saved", ""]]
    for c in run["checkpoints"]:
        if "step" in c:
            facts = [number(c[k]) for k in ("step", "loss", "tokens")]
            row = [c["name"], *facts, size(c["bytes"]), str(c["shards"]), str(c["created"]), c["problem"] or ""]
        else:
            row = [c["name"], *[""] * 6, c["problem"]]
        rows.append(row)
    yield from table(rows, "<>>>>><<")


def _checkpoint(c: Mapping[str, Any]) -> Iterator[str]:
    a = c["attributes"]
    yield f"checkpoint {c['path']}"
    head = [f"step {number(c['step'])}"]
    head += [f"{key} {number(a[key])}" for key in ("loss", "tokens") if key in a]
    yield "  " + ", ".join(
        [*head, f"{c['parameters']:,} parameters", f"{size(c['bytes'])} in {len(c['shards'])} shards"]
    )
    yield f"  saved {a.get('created', '?')} on {a.get('host', '?')}"
    yield from _attributes(c)
    yield ""
    yield from _tree(c["tensors"])
    yield LEGEND
    yield ""
    rows = [["shard", "size", "tensors", "digest", ""]]
    rows += [
        [s["file"], size(s["bytes"]), str(s["tensors"]), s["digest"], "" if s["good"] else "BAD"] for s in c["shards"]
    ]
    yield from table(rows, "<>><<")
    yield ""
    if any("stats" in t for t in c["tensors"]):
        yield from _stats(c["tensors"])
        yield ""
    if c["problems"]:
        yield f"DAMAGED, {len(c['problems'])} problems:"
        yield from (f"  {p}" for p in c["problems"])
    else:
        yield f"whole: every byte of {len(c['shards'])} shards and every tensor's checksum is right"


def _attributes(c: Mapping[str, Any]) -> Iterator[str]:
    """The config's main sections and what else was noted, a line each; long texts by their length."""
    rows = [
        [section, _pairs(c["config"][section], ("", None, 0))]
        for section in SECTIONS
        if isinstance(c["config"].get(section), dict)
    ]
    versions = {k[8:]: v for k, v in c["attributes"].items() if k.startswith("version.")}
    rows += [["versions", _pairs(versions)]] if versions else []
    for key, value in c["attributes"].items():
        if key in SHOWN or key.startswith(("version.", "units.")) or value == "":
            continue
        short = number(value)
        if key not in WHOLE and (len(short) > 80 or "\n" in short):
            first = short.strip().split("\n")[0]
            short = f"{len(short):,} characters: {first[:60]}..."
        rows.append([key, short])
    yield from table(rows, "<<", indent="  ")


def _tree(tensors: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Names by their dots; children that are numbers and look the same are joined."""
    root: dict[str, Any] = {}
    for tensor in tensors:
        node = root
        *above, last = tensor["name"].split(".")
        for part in above:
            node = node.setdefault(part, {})
        node[last] = tensor
    rows = [["tensor", "shape", "dtype", "elements", "kept", "boxes", "size"], *_branch(root, "", 1)]
    elements, total = sum(math.prod(t["shape"]) for t in tensors), sum(t["bytes"] for t in tensors)
    rows.append([f"{len(tensors)} tensors", "", "", f"{elements:,}", "", "", size(total)])
    yield from table(rows, "<<<><>>")


def _branch(node: Mapping[str, Any], indent: str, times: int) -> Iterator[list[str]]:
    for label, child, count in _joined(node):
        while not _is_leaf(child) and len(child) == 1:
            (key, child), *_ = child.items()
            label += f".{key}"
        if _is_leaf(child):
            yield [indent + label, *_leaf(child, times * count)]
        else:
            many = f"  (x {count})" if count > 1 else ""
            yield [indent + label + many, *[""] * 6]
            yield from _branch(child, indent + "  ", times * count)


def _leaf(t: Mapping[str, Any], times: int) -> list[str]:
    each = f"{times} x " if times > 1 else ""
    shape = "[" + ", ".join(map(str, t["shape"])) + "]"
    elements, kept = f"{each}{math.prod(t['shape']):,}", " ".join(LABELS[k] for k in t["kinds"])
    return [shape, t["dtype"], elements, kept, str(t["parts"]), each + size(t["bytes"])]


def _joined(node: Mapping[str, Any]) -> Iterator[tuple[str, Any, int]]:
    """(label, child, how many it stands for): runs of numbered children with equal trees become one."""
    run: list[str] = []
    for key in [*node, ""]:
        if run and key.isdigit() and int(key) == int(run[-1]) + 1 and _signature(node[key]) == _signature(node[run[0]]):
            run.append(key)
            continue
        if run:
            yield run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}", node[run[0]], len(run)
        run = [key] if key else []


def _signature(node: Mapping[str, Any]) -> Any:
    if _is_leaf(node):
        return tuple(node["shape"]), node["dtype"], tuple(node["kinds"]), node["parts"]
    return tuple((key, _signature(child)) for key, child in node.items())


def _is_leaf(node: Mapping[str, Any]) -> bool:
    return isinstance(node.get("shape"), list)


def _stats(tensors: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    rows = [["statistics", "", "mean", "rms", "max |x|", "spectral", "NaN", "Inf"]]
    for tensor in tensors:
        for kind, s in tensor["stats"].items():
            first = [tensor["name"] if kind == tensor["kinds"][0] else "", LABELS[kind]]
            if "problem" in s:
                rows.append([*first, "unreadable", "", "", "", "", ""])
                continue
            values = [f"{s['mean']:+.3e}", f"{s['rms']:.3e}", f"{s['max']:.3e}"]
            values.append(f"{s['spectral']:.3e}" if "spectral" in s else "")
            rows.append([*first, *values, *(f"{s[k]:,}" if s[k] else "0" for k in ("nan", "inf"))])
    yield from table(rows, "<<>>>>>>")


def table(rows: Sequence[Sequence[str]], aligned: str, indent: str = "") -> Iterator[str]:
    """Columns two spaces apart, each as wide as its widest cell but the last one; ``aligned`` has < or > per column."""
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(len(aligned))]
    for row in rows:
        yield indent + "  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, aligned, widths, strict=True)).rstrip()


def number(value: Any) -> str:
    """Integers and large reals with commas, other reals with five digits, the rest as it is."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.5g}"


def size(count: int) -> str:
    """Bytes in the unit that leaves one to four digits before the point."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{count} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def _pairs(values: Mapping[str, Any], hidden: Sequence[Any] = ("", None)) -> str:
    return ", ".join(f"{key} {number(value)}" for key, value in values.items() if value not in hidden)
