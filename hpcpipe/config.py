"""What a run is: frozen dataclasses, read from TOML and from ``--set section.key=value``.

Every setting of the program stands here, in one line with its default, unit, meaning and limits (``settings`` reads,
checks and writes them), and so do the rules between settings. Values that need the data, the model or the number of
ranks are 0 and are filled in where those are known.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hpcpipe.settings import Schema, value


class UserError(Exception):
    """Something a person can put right; the message is one sentence: what, which numbers, what to do."""


@dataclass(frozen=True)
class ModelConfig:
    """The model's family and shape; a size of 0 (or an absent ``tied``) is taken from the preset."""

    preset: str = value("", "a named size (llama-tiny, gpt2-124M, llama-8B, ...); the keys below change it")
    family: str = value("llama", "llama or gpt2", one_of=("llama", "gpt2"))
    layers: int = value(0, "transformer blocks", least=0)
    heads: int = value(0, "query heads", least=0)
    kv_heads: int = value(0, "key/value heads; 0 = heads", least=0)
    width: int = value(0, "channels of the residual stream", least=0)
    ffn: int = value(0, "channels inside the MLP; 0 = the family's usual multiple of width", least=0)
    context: int = value(0, "longest sequence, tokens", least=0)
    vocab: int = value(0, "rows of the embedding; 0 = the data's tokenizer", least=0)
    tied: bool | None = value(None, "head and embedding share one matrix; absent = the preset's or family's choice")
    dropout: float = value(0.0, "probability of dropping an activation", least=0, below=1)
    theta: float = value(10000.0, "base of the rotary angles", above=0)
    eps: float = value(1e-5, "added to the variance in a norm", above=0)


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens are."""

    path: str = value("", "folder made by `hpcpipe prepare`, relative to the working directory")


@dataclass(frozen=True)
class TrainConfig:
    """How long, and in which pieces."""

    steps: int = value(1000, "optimizer steps", least=1)
    batch: int = value(32, "sequences per step, over all replicas", least=1)
    microbatch: int = value(4, "sequences that travel through the pipeline together", least=1)
    length: int = value(0, "tokens per sequence; 0 = model.context", least=0)
    recompute: str = value(
        "none", "activations computed again for the backward pass: none or block", one_of=("none", "block")
    )
    activations: str = value(
        "float32", "how they wait for the backward pass: float32, or bfloat16 in half the bytes",
        one_of=("float32", "bfloat16"),
    )  # fmt: skip
    compute: str = value(
        "float32", "what products multiply: float32; on a GPU also bfloat16, or fp8, fp8_block, mxfp8 within bfloat16",
        one_of=("float32", "bfloat16", "fp8", "fp8_block", "mxfp8"),
    )  # fmt: skip
    log_every: int = value(10, "steps between lines of progress", least=1, result=False)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) and its rate over time."""

    lr: float = value(3e-4, "peak rate", above=0)
    min_lr: float = value(0.0, "rate at the last step", least=0)
    schedule: str = value("cosine", "cosine or wsd (warm-up, stable, decay)", one_of=("cosine", "wsd"))
    warmup: int = value(100, "steps of linear warm-up; absent = 100 or a tenth of the run", least=0)
    decay_steps: int = value(0, "wsd: steps of decay at the end; absent or 0 = a fifth of the run", least=0)
    beta1: float = value(0.9, "decay of the first moment", least=0, below=1)
    beta2: float = value(0.95, "decay of the second moment", least=0, below=1)
    eps: float = value(1e-8, "added to the root of the second moment", above=0)
    weight_decay: float = value(0.1, "decoupled decay of matrices; norms and biases have none", least=0)
    clip: float = value(1.0, "largest global norm of the gradient; 0 = never clip", least=0)
    early: bool | None = value(
        None, "update before the global norm is known, again where it clips; absent = where it gains", result=False
    )
    shard: bool = value(
        False, "copies of the model divide the moments among them: fewer bytes per rank, the same bits", result=False
    )


@dataclass(frozen=True)
class PipelineConfig:
    """How the model is laid over the ranks, of which there are ranks * replicas."""

    ranks: int = value(0, "ranks of one pipeline; 0 = all ranks / replicas", least=0, result=False)
    replicas: int = value(1, "data-parallel copies of the pipeline; 0 = all ranks / ranks", least=0, result=False)
    schedule: str = value("1f1b", "a name such as 1f1b or zb_v (docs/schedules.md), file:PATH, or search", result=False)
    stages: int = value(0, "stages of the model; 0 = as many per rank as the schedule is for", least=0, result=False)
    group: int = value(0, "interleaved: microbatches a stage runs in a row; 0 = ranks", least=0, result=False)
    cut: str | tuple[int, ...] = value(
        "auto",
        "auto (by cost), measured (by cost on this machine), even, or slots per stage such as [3, 4]",
        one_of=("auto", "measured", "even"),
        result=False,
    )
    memory: float = value(0.0, "GiB that a rank may use, for cut and search; 0 = no limit", least=0, result=False)
    timeout: float = value(
        600.0, "seconds a rank waits for another before it names it and ends the job", above=0, result=False
    )


@dataclass(frozen=True)
class EvalConfig:
    """Validation loss."""

    every: int = value(0, "steps between evaluations; 0 = never", least=0, result=False)
    microbatches: int = value(8, "microbatches per evaluation", least=1, result=False)


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save. The last step is always saved."""

    every: int = value(0, "steps between checkpoints; 0 = only at the end", least=0, result=False)
    keep: int = value(2, "newest checkpoints kept; 0 = all", least=0, result=False)
    keep_every: int = value(0, "steps whose multiples are kept as well; 0 = none", least=0, result=False)
    mirror: str = value(
        "", "folder for a second copy of each shard, made on another node ({host}: its name)",
        result=False,
    )  # fmt: skip


@dataclass(frozen=True)
class DeviceConfig:
    """What computes."""

    backend: str = value(
        "cpu", "cpu (native library), cuda (a GPU for each rank) or reference (numpy)",
        one_of=("cpu", "cuda", "reference"),
    )  # fmt: skip
    transport: str = value(
        "auto", "how messages leave a GPU: nccl, mpi (CUDA-aware), staged (through pinned host memory) or auto",
        one_of=("auto", "nccl", "mpi", "staged"), result=False,
    )  # fmt: skip
    threads: int = value(0, "threads per rank; 0 = this rank's share of the cores", least=0, most=1024, result=False)


@dataclass(frozen=True)
class Config:
    """One run. The sections of the file are the fields of the same name."""

    out: str = value("run", "folder for checkpoints, metrics and timelines", result=False)
    seed: int = value(0, "one number that fixes the initial weights, the order of the data and dropout", least=0)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)


SCHEMA = Schema.of(Config)


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """The run that a TOML file and ``section.key=value`` overrides (later ones win) describe.

    An override's value is read as TOML; what is not TOML, or is meant for a text, is taken as it stands. UserError for
    whatever is wrong with the file, a key, a value or two values together.
    """
    source = os.fspath(path)
    return _build(_read(source), source, overrides)


def loads(text: str, source: str = "config") -> Config:
    """``load`` for text in memory, such as the copy inside a checkpoint; ``source`` names it in errors."""
    return _build(text, source, ())


def to_toml(config: Config, comments: bool = False) -> str:
    """TOML that ``loads`` turns into an equal Config; with ``comments`` every key carries its meaning."""
    return SCHEMA.write(config, comments)


def digest(config: Config) -> str:
    """16 hexadecimal digits of the whole config: the same on every rank, machine and Python version."""
    return hashlib.sha256(to_toml(config).encode()).hexdigest()[:16]


def results_digest(config: Config) -> str:
    """Like ``digest`` over only those settings that change a loss or a parameter (not out, log_every, stages, ...).

    How many copies of the model there are is not a setting alone: it follows from ``pipeline`` and its schedule.
    """
    text = SCHEMA.write(config, keep=lambda key: key.limits.result)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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


def _build(text: str, source: str, overrides: Sequence[str]) -> Config:
    try:
        values = SCHEMA.read(text, source) | dict(map(SCHEMA.override, overrides))
        config = _filled(values)
        _agree(config, source)
    except ValueError as error:
        raise UserError(str(error)) from None
    return config


def _filled(values: Mapping[str, Any]) -> Config:
    sections = {
        section: kind(**{key.leaf: values[key.name] for key in SCHEMA.members(section) if key.name in values})
        for section, kind in SCHEMA.sections.items()
    }
    config = Config(**sections, **{key.name: values[key.name] for key in SCHEMA.members("") if key.name in values})

    # A default that depends on the length of the run may not make a short run an error.
    steps, optimizer = config.train.steps, config.optimizer
    if "optimizer.warmup" not in values:
        optimizer = replace(optimizer, warmup=min(optimizer.warmup, steps // 10))
    if optimizer.schedule == "wsd" and optimizer.decay_steps == 0:
        optimizer = replace(optimizer, decay_steps=min(max(1, steps // 5), steps - min(optimizer.warmup, steps)))
    return replace(config, optimizer=optimizer)


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
    backend, where = config.device.backend, {"float32": ("cpu", "cuda", "reference"), "bfloat16": ("cuda", "reference")}
    if backend not in where.get(train.compute, ("cuda",)):
        raise UserError(
            f"{source}: train.compute is {train.compute}, which device.backend = {backend} does not multiply; use "
            'device.backend = "cuda", or train.activations = "bfloat16" for the memory alone'
        )
    if train.compute != "float32" and train.activations == "bfloat16":
        raise UserError(f"{source}: train.compute = {train.compute} keeps bfloat16 anyway; leave train.activations out")
    if config.checkpoint.mirror and config.checkpoint.mirror == config.out:
        raise UserError(f"{source}: checkpoint.mirror is out, {config.out}; a second copy needs a folder of its own")
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
            f"train.batch = {train.batch} sequences cannot be shared by {replicas} "
            f"cop{'ies' if replicas > 1 else 'y'} of the model in microbatches of {train.microbatch}; "
            f"make train.batch a multiple of {share}, for example {nearest}"
        )
    return train.batch // share


def grid(pipeline: PipelineConfig, total: int) -> tuple[int, int]:
    """(ranks of a pipeline, replicas) of ``total`` ranks; UserError where they do not multiply to it."""
    ranks, replicas = pipeline.ranks, pipeline.replicas
    if not ranks and not replicas:
        replicas = 1
    if not ranks and total % replicas == 0:
        ranks = total // replicas
    elif not replicas and total % ranks == 0:
        replicas = total // ranks
    if not ranks or not replicas or ranks * replicas != total:
        told = ((ranks, "pipeline rank"), (replicas, "replica"))
        asked = " and ".join(f"{n} {word}{'s' * (n > 1)}" for n, word in told if n)
        start = str(ranks * replicas) if ranks and replicas else f"a multiple of {ranks or replicas}"
        raise UserError(
            f"pipeline: {total} rank{'s' * (total > 1)} cannot be laid out as {asked}; "
            f"start {start} ranks, or change pipeline.ranks or pipeline.replicas"
        )
    return ranks, replicas
