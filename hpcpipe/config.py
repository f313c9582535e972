"""What a run is: frozen dataclasses, read from TOML and from ``--set section.key=value``.

A field's declaration is its only home: default, unit, meaning and limits stand in one line, and from it come the type
check, the suggestion for a misspelt key, the comments in a written file and the digests. Values that need the data, the
model or the number of ranks are 0 here and are filled in where those are known. Imports nothing from this package.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

LARGEST = 2**63 - 1


class UserError(Exception):
    """Something a person can put right; the message is one sentence: what, which numbers, what to do."""


class Limits(NamedTuple):
    """What a field accepts beside its type; ``above`` and ``below`` are exclusive, ``least`` and ``most`` inclusive."""

    doc: str
    least: float | None = None
    above: float | None = None
    below: float | None = None
    most: float | None = None
    one_of: tuple[str, ...] = ()
    result: bool = True  # False: changing it leaves every loss and parameter the same


def _value(default: Any, doc: str, **limits: Any) -> Any:
    return field(default=default, metadata={"limits": Limits(doc, **limits)})


@dataclass(frozen=True)
class ModelConfig:
    """The model's family and shape; a size of 0 (or an absent ``tied``) is taken from the preset."""

    preset: str = _value("", "a named size (tiny, gpt2-124M, llama-8B, ...); the keys below change it")
    family: str = _value("llama", "llama or gpt2", one_of=("llama", "gpt2"))
    layers: int = _value(0, "transformer blocks", least=0)
    heads: int = _value(0, "query heads", least=0)
    kv_heads: int = _value(0, "key/value heads; 0 = heads", least=0)
    width: int = _value(0, "channels of the residual stream", least=0)
    ffn: int = _value(0, "channels inside the MLP; 0 = the family's usual multiple of width", least=0)
    context: int = _value(0, "longest sequence, tokens", least=0)
    vocab: int = _value(0, "rows of the embedding; 0 = the data's tokenizer", least=0)
    tied: bool | None = _value(None, "head and embedding share one matrix; absent = the preset's or family's choice")
    dropout: float = _value(0.0, "probability of dropping an activation", least=0, below=1)
    theta: float = _value(10000.0, "base of the rotary angles", above=0)
    eps: float = _value(1e-5, "added to the variance in a norm", above=0)


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens are."""

    path: str = _value("", "folder made by `hpcpipe prepare`, relative to the working directory")


@dataclass(frozen=True)
class TrainConfig:
    """How long, and in which pieces."""

    steps: int = _value(1000, "optimizer steps", least=1)
    batch: int = _value(32, "sequences per step, over all replicas", least=1)
    microbatch: int = _value(4, "sequences that travel through the pipeline together", least=1)
    length: int = _value(0, "tokens per sequence; 0 = model.context", least=0)
    recompute: str = _value(
        "none", "activations computed again for the backward pass: none or block", one_of=("none", "block")
    )
    log_every: int = _value(10, "steps between lines of progress", least=1, result=False)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) and its rate over time."""

    lr: float = _value(3e-4, "peak rate", above=0)
    min_lr: float = _value(0.0, "rate at the last step", least=0)
    schedule: str = _value("cosine", "cosine or wsd (warm-up, stable, decay)", one_of=("cosine", "wsd"))
    warmup: int = _value(100, "steps of linear warm-up; absent = 100 or a tenth of the run", least=0)
    decay_steps: int = _value(0, "wsd: steps of decay at the end; absent or 0 = a fifth of the run", least=0)
    beta1: float = _value(0.9, "decay of the first moment", least=0, below=1)
    beta2: float = _value(0.95, "decay of the second moment", least=0, below=1)
    eps: float = _value(1e-8, "added to the root of the second moment", above=0)
    weight_decay: float = _value(0.1, "decoupled decay of matrices; norms and biases have none", least=0)
    clip: float = _value(1.0, "largest global norm of the gradient; 0 = never clip", least=0)


@dataclass(frozen=True)
class PipelineConfig:
    """How the model is laid over the ranks; ranks = stages * replicas."""

    stages: int = _value(0, "pipeline stages; 0 = ranks / replicas", least=0, result=False)
    replicas: int = _value(1, "data-parallel copies of the pipeline; 0 = ranks / stages", least=0)
    schedule: str = _value("1f1b", "1f1b or gpipe", one_of=("1f1b", "gpipe"), result=False)
    cut: str | tuple[int, ...] = _value(
        "auto", "auto (by cost), even, or slots per stage such as [3, 4]", one_of=("auto", "even"), result=False
    )
    timeout: float = _value(60.0, "seconds without progress before a wait is reported as a hang", above=0, result=False)


@dataclass(frozen=True)
class EvalConfig:
    """Validation loss."""

    every: int = _value(0, "steps between evaluations; 0 = never", least=0, result=False)
    microbatches: int = _value(8, "microbatches per evaluation", least=1, result=False)


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save. The last step is always saved."""

    every: int = _value(0, "steps between checkpoints; 0 = only at the end", least=0, result=False)
    keep: int = _value(2, "newest checkpoints kept; 0 = all", least=0, result=False)


@dataclass(frozen=True)
class DeviceConfig:
    """What computes."""

    backend: str = _value("cpu", "cpu (native library) or reference (numpy)", one_of=("cpu", "reference"))
    threads: int = _value(0, "threads per rank; 0 = this rank's share of the cores", least=0, most=1024, result=False)


@dataclass(frozen=True)
class Config:
    """One run. The sections of the file are the fields of the same name."""

    out: str = _value("run", "folder for checkpoints, metrics and timelines", result=False)
    seed: int = _value(0, "one number that fixes the initial weights, the order of the data and dropout", least=0)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)


class Key(NamedTuple):
    """One setting: its dotted name, its type and its limits."""

    name: str
    type: Any
    limits: Limits


def _keys(kind: type, prefix: str = "") -> dict[str, Key]:
    hints = get_type_hints(kind)
    found: dict[str, Key] = {}
    for f in fields(kind):
        if is_dataclass(hints[f.name]):
            found |= _keys(hints[f.name], f"{prefix}{f.name}.")
        else:
            found[prefix + f.name] = Key(prefix + f.name, hints[f.name], f.metadata["limits"])
    return found


KEYS: Mapping[str, Key] = _keys(Config)
SECTIONS: Mapping[str, Any] = {k: kind for k, kind in get_type_hints(Config).items() if is_dataclass(kind)}


# --- reading


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """The run that a TOML file and ``section.key=value`` overrides (later ones win) describe.

    An override's value is read as TOML; what is not TOML, or is meant for a text, is taken as it stands. UserError for
    whatever is wrong with the file, a key, a value or two values together.
    """
    source = os.fspath(path)
    values = _flat(_parse(_read(source), source), source)
    for text in overrides:
        name, value = _override(text)
        values[name] = value
    return _build(values, source)


def loads(text: str, source: str = "config") -> Config:
    """``load`` for text in memory, such as the copy inside a checkpoint; ``source`` names it in errors."""
    return _build(_flat(_parse(text, source), source), source)


def _read(source: str) -> str:
    try:
        raw = Path(source).read_bytes()
    except FileNotFoundError:
        raise UserError(f"config: there is no file {source}; give the path of a TOML file") from None
    except IsADirectoryError:
        raise UserError(f"config: {source} is a folder; give the path of the TOML file in it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"config: {source!r} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{source}: line {line} is not UTF-8 (byte 0x{raw[error.start]:02x} at offset {error.start}); "
            "save the file as UTF-8"
        ) from None


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        tree: dict[str, Any] = tomllib.loads(text)
        return tree
    except tomllib.TOMLDecodeError as error:
        what, _, where = str(error).rpartition(" (at ")
        at = re.search(r"line (\d+), column (\d+)", where)
        line, column = (at[1], f", column {at[2]}") if at else (max(1, len(text.splitlines())), "")
        raise UserError(f"{source}: line {line}{column} is not valid TOML: {what[:1].lower()}{what[1:]}") from None
    except RecursionError:
        raise UserError(f"{source}: the values are nested too deeply to be a config") from None


def _flat(tree: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Dotted name -> checked value."""
    values: dict[str, Any] = {}
    for name, value in tree.items():
        if name not in SECTIONS:
            values[name] = _typed(_known(name, source), value, source)
        elif not isinstance(value, dict):
            raise UserError(f"{source}: {name} is a section, not a value; write [{name}] and its keys below it")
        else:
            for key, inner in value.items():
                values[f"{name}.{key}"] = _typed(_known(f"{name}.{key}", source), inner, source)
    return values


def _override(text: str) -> tuple[str, Any]:
    source = f"--set {text}" if text.isprintable() else f"--set {text!r}"
    name, equals, raw = (part.strip() for part in text.partition("="))
    if not equals or not name:
        raise UserError(f"{source}: an override is written section.key=value, for example train.steps=100")
    if name in SECTIONS:
        raise UserError(f"{source}: {name} is a section; name one of its keys, for example {_members(name)[0]}")
    key = _known(name, source)
    try:
        table = tomllib.loads(f"value = {raw}")
    except (tomllib.TOMLDecodeError, RecursionError):
        table = {}
    value = table["value"] if list(table) == ["value"] else raw
    if key.type is str and not isinstance(value, str):
        value = raw
    return name, _typed(key, value, source)


def _known(name: str, source: str) -> Key:
    """The key of that name, or an error with the nearest right one."""
    if name in KEYS:
        return KEYS[name]
    section, _, leaf = name.rpartition(".")
    elsewhere = [k for k in KEYS if k.rpartition(".")[2] == leaf]
    if section in SECTIONS:
        inside = difflib.get_close_matches(leaf, [k.rpartition(".")[2] for k in _members(section)], n=1)
        near = [f"{section}.{found}" for found in inside]
    else:
        near = difflib.get_close_matches(name, [*KEYS, *SECTIONS], n=1, cutoff=0.7)
    guess = elsewhere[:1] or near
    if guess and guess[0] in SECTIONS:
        hint = f"did you mean the section [{guess[0]}]?"
    elif guess:
        hint = f"did you mean {guess[0]}?"
    elif section in SECTIONS:
        hint = f"[{section}] has {', '.join(k.rpartition('.')[2] for k in _members(section))}"
    else:
        hint = f"there are {', '.join(_members(''))} and the sections {', '.join(SECTIONS)}"
    raise UserError(f"{source}: unknown key {name}; {hint}")


def _members(section: str) -> list[str]:
    return [k for k in KEYS if k.rpartition(".")[0] == section]


# --- checking


def _typed(key: Key, value: Any, source: str) -> Any:
    """The value in the key's type and within its limits."""
    expected = {
        str: "a text",
        int: "a whole number",
        float: "a number",
        bool | None: "true or false",
    }.get(key.type, "a text or a list of whole numbers")
    if isinstance(value, list) and key.type == str | tuple[int, ...]:
        if not value or any(type(x) is not int or x < 1 for x in value):
            raise UserError(f"{source}: {key.name} is {_shown(value)}, expected slots per stage, each 1 or more")
        return tuple(value)
    kinds = {int: (int,), float: (float, int), bool | None: (bool,)}.get(key.type, (str,))
    if type(value) not in kinds:
        raise UserError(f"{source}: {key.name} is {_shown(value)}, expected {expected}")
    _within(key, value, source)
    return float(value) if key.type is float else value


def _shown(value: Any) -> str:
    """A TOML value in words, for an error."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, str):
        return f'the text "{value}"'
    if isinstance(value, list):
        return f"the list {value}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _within(key: Key, value: Any, source: str) -> None:
    limits, broken = key.limits, ""
    if isinstance(value, str):
        if limits.one_of and value not in limits.one_of:
            near = difflib.get_close_matches(value, limits.one_of, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f'{source}: {key.name} is "{value}", expected {" or ".join(limits.one_of)}{hint}')
        if not value.isprintable() or any("\ud800" <= c <= "\udfff" for c in value):
            raise UserError(f"{source}: {key.name} is {value!r}, which has characters that are not printable text")
        return
    if isinstance(value, bool):
        return
    if not math.isfinite(value) or abs(value) > LARGEST:
        broken = f"a number between -{LARGEST} and {LARGEST}"
    elif limits.least is not None and value < limits.least:
        broken = f"{limits.least} or more"
    elif limits.above is not None and value <= limits.above:
        broken = f"more than {limits.above}"
    elif limits.below is not None and value >= limits.below:
        broken = f"less than {limits.below}"
    elif limits.most is not None and value > limits.most:
        broken = f"at most {limits.most}"
    if broken:
        raise UserError(f"{source}: {key.name} is {value}, expected {broken} ({limits.doc})")


def _build(values: Mapping[str, Any], source: str) -> Config:
    sections = {
        section: kind(**{k.rpartition(".")[2]: values[k] for k in _members(section) if k in values})
        for section, kind in SECTIONS.items()
    }
    config = Config(**sections, **{k: values[k] for k in _members("") if k in values})

    # A default that depends on the length of the run may not make a short run an error.
    steps, optimizer = config.train.steps, config.optimizer
    if "optimizer.warmup" not in values:
        optimizer = replace(optimizer, warmup=min(optimizer.warmup, steps // 10))
    if optimizer.schedule == "wsd" and optimizer.decay_steps == 0:
        optimizer = replace(optimizer, decay_steps=min(max(1, steps // 5), steps - min(optimizer.warmup, steps)))
    config = replace(config, optimizer=optimizer)
    _agree(config, source)
    return config


def _agree(config: Config, source: str) -> None:
    """The rules between settings."""
    train, optimizer, pipeline, model = config.train, config.optimizer, config.pipeline, config.model
    if optimizer.warmup > train.steps:
        raise UserError(
            f"{source}: optimizer.warmup is {optimizer.warmup} steps, more than train.steps = {train.steps}; "
            "lower the first or raise the second"
        )
    if optimizer.schedule == "wsd" and optimizer.warmup + optimizer.decay_steps > train.steps:
        raise UserError(
            f"{source}: optimizer.warmup = {optimizer.warmup} and optimizer.decay_steps = {optimizer.decay_steps} "
            f"do not fit into train.steps = {train.steps}; shorten one of them"
        )
    if optimizer.min_lr > optimizer.lr:
        raise UserError(
            f"{source}: optimizer.min_lr is {optimizer.min_lr}, above optimizer.lr = {optimizer.lr}; lower the first"
        )
    if model.context and train.length > model.context:
        raise UserError(
            f"{source}: train.length is {train.length} tokens, but model.context is {model.context}; "
            "lower the first or raise the second"
        )
    if isinstance(pipeline.cut, tuple) and pipeline.stages and len(pipeline.cut) != pipeline.stages:
        raise UserError(
            f"{source}: pipeline.cut names {len(pipeline.cut)} stages, but pipeline.stages is {pipeline.stages}; "
            "make them agree"
        )
    try:
        microbatches(train, max(1, pipeline.replicas))
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def microbatches(train: TrainConfig, replicas: int) -> int:
    """Microbatches per step and replica; UserError where the batch does not divide."""
    share = train.microbatch * replicas
    if train.batch % share:
        down, up = train.batch // share * share, (train.batch // share + 1) * share
        nearest = f"{down} or {up}" if down else str(up)
        raise UserError(
            f"train.batch = {train.batch} sequences cannot be shared by {replicas} replica{'s' * (replicas > 1)} "
            f"in microbatches of {train.microbatch}; make train.batch a multiple of {share}, for example {nearest}"
        )
    return train.batch // share


def grid(pipeline: PipelineConfig, ranks: int) -> tuple[int, int]:
    """(stages, replicas) on that many ranks; UserError where they do not multiply to it."""
    stages, replicas = pipeline.stages, pipeline.replicas
    if isinstance(pipeline.cut, tuple):
        stages = stages or len(pipeline.cut)
    if not stages and not replicas:
        replicas = 1
    if not stages and ranks % replicas == 0:
        stages = ranks // replicas
    elif not replicas and ranks % stages == 0:
        replicas = ranks // stages
    if not stages or not replicas or stages * replicas != ranks:
        asked = " and ".join(
            f"{n} {word}{'s' * (n > 1)}" for n, word in ((stages, "stage"), (replicas, "replica")) if n
        )
        start = str(stages * replicas) if stages and replicas else f"a multiple of {stages or replicas}"
        raise UserError(
            f"pipeline: {ranks} rank{'s' * (ranks > 1)} cannot be laid out as {asked}; "
            f"start {start} ranks, or change pipeline.stages or pipeline.replicas"
        )
    return stages, replicas


# --- writing


def to_toml(config: Config, comments: bool = False) -> str:
    """TOML that ``loads`` turns into an equal Config; with ``comments`` every key carries its meaning."""
    blocks = [_block("", config, comments)]
    blocks += [f"[{section}]\n" + _block(section, getattr(config, section), comments) for section in SECTIONS]
    return "\n".join(blocks)


def _block(section: str, values: object, comments: bool) -> str:
    lines = []
    for name in _members(section):
        leaf = name.rpartition(".")[2]
        value = getattr(values, leaf)
        note = KEYS[name].limits.doc
        if value is None:
            lines.append(f"# {leaf} = true or false  # {note}" if comments else "")
        else:
            line = f"{leaf} = {_literal(value)}"
            lines.append(f"{line:<28}  # {note}" if comments else line)
    return "".join(line + "\n" for line in lines if line)


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # A printable text in JSON is one in TOML, if nothing becomes a surrogate pair.
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, tuple):
        return "[" + ", ".join(map(str, value)) + "]"
    return repr(value)


def digest(config: Config) -> str:
    """16 hexadecimal digits of the whole config: the same on every rank, machine and Python version."""
    return hashlib.sha256(to_toml(config).encode()).hexdigest()[:16]


def results_digest(config: Config) -> str:
    """Like ``digest`` over only those settings that change a loss or a parameter (not out, log_every, stages, ...)."""
    lines = to_toml(config).splitlines()
    section, kept = "", []
    for line in lines:
        leaf = line.partition(" = ")[0]
        section = line[1:-1] if line.startswith("[") else section
        name = f"{section}.{leaf}" if section else leaf
        if name not in KEYS or KEYS[name].limits.result:
            kept.append(line)
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:16]
