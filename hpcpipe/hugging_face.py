"""Checkpoints to and from Hugging Face's folders: config.json, safetensors, tokenizer.json.

GPT-2 and Llama, and what has Llama's shapes (Mistral). Tensors pass one at a time, so a model larger than memory is
fine: what is exported lies in files of a few GiB, and of what is imported one tensor is held.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpcpipe import model
from hpcpipe.checkpoint import write
from hpcpipe.checkpoint.layout import KINDS
from hpcpipe.checkpoint.read import Checkpoint
from hpcpipe.config import Config, ModelConfig, UserError, loads, to_toml
from hpcpipe.data import TOKENIZER

Array = npt.NDArray[Any]
CONFIG, INDEX = "config.json", "model.safetensors.index.json"
FILE_BYTES = 2 << 30  # of one file of an export, about
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ITEMS = {"float32": 4, "float16": 2, "bfloat16": 2}

# Ours <- theirs. Several on the right are stacked by rows; "T" marks Conv1D, which holds [in, out]. {} is the layer.
NAMES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "gpt2": {
        "embed.weight": ("transformer.wte.weight",),
        "embed.position": ("transformer.wpe.weight",),
        "layer.{}.norm1.weight": ("transformer.h.{}.ln_1.weight",),
        "layer.{}.norm1.bias": ("transformer.h.{}.ln_1.bias",),
        "layer.{}.attention.qkv.weight": ("transformer.h.{}.attn.c_attn.weight T",),
        "layer.{}.attention.qkv.bias": ("transformer.h.{}.attn.c_attn.bias",),
        "layer.{}.attention.out.weight": ("transformer.h.{}.attn.c_proj.weight T",),
        "layer.{}.attention.out.bias": ("transformer.h.{}.attn.c_proj.bias",),
        "layer.{}.norm2.weight": ("transformer.h.{}.ln_2.weight",),
        "layer.{}.norm2.bias": ("transformer.h.{}.ln_2.bias",),
        "layer.{}.mlp.up.weight": ("transformer.h.{}.mlp.c_fc.weight T",),
        "layer.{}.mlp.up.bias": ("transformer.h.{}.mlp.c_fc.bias",),
        "layer.{}.mlp.down.weight": ("transformer.h.{}.mlp.c_proj.weight T",),
        "layer.{}.mlp.down.bias": ("transformer.h.{}.mlp.c_proj.bias",),
        "head.norm.weight": ("transformer.ln_f.weight",),
        "head.norm.bias": ("transformer.ln_f.bias",),
        "head.weight": ("lm_head.weight",),
    },
    "llama": {
        "embed.weight": ("model.embed_tokens.weight",),
        "layer.{}.norm1.weight": ("model.layers.{}.input_layernorm.weight",),
        "layer.{}.attention.qkv.weight": tuple(f"model.layers.{{}}.self_attn.{x}_proj.weight" for x in "qkv"),
        "layer.{}.attention.out.weight": ("model.layers.{}.self_attn.o_proj.weight",),
        "layer.{}.norm2.weight": ("model.layers.{}.post_attention_layernorm.weight",),
        "layer.{}.mlp.gate_up.weight": tuple(f"model.layers.{{}}.mlp.{x}_proj.weight" for x in ("gate", "up")),
        "layer.{}.mlp.down.weight": ("model.layers.{}.mlp.down_proj.weight",),
        "head.norm.weight": ("model.norm.weight",),
        "head.weight": ("lm_head.weight",),
    },
}
# Theirs that are no parameters: masks and angles that old versions saved.
BUFFERS = re.compile(r".*\.(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)")


class Source(NamedTuple):
    """One tensor of theirs: its name, the rows [first, end) of ours that it is, and whether it lies transposed."""

    name: str
    first: int
    end: int
    turned: bool


def sources(m: ModelConfig, name: str) -> list[Source]:
    """Which of their tensors a parameter of a resolved model is made of."""
    layer = re.search(r"\d+", name)
    theirs = NAMES[m.family][re.sub(r"\d+", "{}", name, count=1) if layer else name]
    rows = model.parameters(m)[name].shape[0]
    if name.endswith("attention.qkv.weight") and len(theirs) == 3:
        d = m.width // m.heads
        sizes = [m.heads * d, m.kv_heads * d, m.kv_heads * d]
    else:
        sizes = [rows // len(theirs)] * len(theirs)
    found, at = [], 0
    for text, size in zip(theirs, sizes, strict=True):
        key, _, turned = text.format(layer[0] if layer else "").partition(" ")
        found.append(Source(key, at, at + size, bool(turned)))
        at += size
    return found


# --- out


def export(path: str, out: str, dtype: str = "") -> None:
    """Writes a checkpoint, or a run's newest, as a folder that ``transformers`` loads.

    ``dtype`` is float32, bfloat16 or float16; by default what an imported model came in, else float32.
    """
    checkpoint, folder = Checkpoint.open(path), Path(out)
    if wrong := checkpoint.verify():
        raise UserError(f"export: {checkpoint.path} is not exported: {wrong[0]}")
    config = loads(str(checkpoint.attributes["config"]), f"the config in {checkpoint.path}")
    m = config.model
    dtype = dtype or str(checkpoint.attributes.get("imported.dtype", "float32"))
    _must_be_free(folder, "export")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_tensors(checkpoint, m, folder, dtype)
        (folder / CONFIG).write_text(json.dumps(_their_config(m, dtype), indent=2) + "\n", encoding="utf-8")
        tokenizer = checkpoint.path.parent / TOKENIZER
        if tokenizer.is_file():
            shutil.copyfile(tokenizer, folder / TOKENIZER)
            kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": m.context}
            (folder / "tokenizer_config.json").write_text(json.dumps(kind, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"export: {folder} cannot be written ({error}); what is there is not whole") from None


def _write_tensors(checkpoint: Checkpoint, m: ModelConfig, folder: Path, dtype: str) -> None:
    """One file, or several and an index of them: each is written when it is full."""
    parts = [(name, source) for name in model.parameters(m) for source in sources(m, name)]
    shapes = {name: spec.shape for name, spec in model.parameters(m).items()}
    groups: list[list[tuple[str, Source]]] = [[]]
    taken = 0
    for name, source in parts:
        size = ITEMS[dtype] * (source.end - source.first) * int(np.prod(shapes[name][1:]))
        if groups[-1] and taken + size > FILE_BYTES:
            groups.append([])
            taken = 0
        groups[-1].append((name, source))
        taken += size
    where: dict[str, str] = {}
    for i, group in enumerate(groups):
        file = "model.safetensors" if len(groups) == 1 else f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        _write_file(folder / file, {s.name: _theirs(checkpoint, name, s) for name, s in group}, dtype)
        where |= {source.name: file for _, source in group}
    if len(groups) > 1:
        size = ITEMS[dtype] * model.parameter_count(m)
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _theirs(checkpoint: Checkpoint, name: str, source: Source) -> Array:
    rows = checkpoint.read("parameter", name, slices=(slice(source.first, source.end),))
    return np.ascontiguousarray(rows.T if source.turned else rows)


def _write_file(file: Path, tensors: Mapping[str, Array], dtype: str) -> None:
    safetensors, types = _libraries()
    part = file.with_name(f"{file.name}.part")
    kind = types.bfloat16 if dtype == "bfloat16" else dtype
    try:
        told = {name: array.astype(kind, copy=False) for name, array in tensors.items()}
        safetensors.numpy.save_file(told, str(part), {"format": "pt"})
    except safetensors.SafetensorError as error:  # a full disk, too, comes as one
        raise OSError(str(error)) from None
    mask = os.umask(0)
    os.umask(mask)
    part.chmod(0o666 & ~mask)  # the library gives it to its owner alone
    part.replace(file)


def _their_config(m: ModelConfig, dtype: str) -> dict[str, Any]:
    usual = {"vocab_size": m.vocab, "tie_word_embeddings": bool(m.tied), "torch_dtype": dtype, "use_cache": True}
    if m.family == "gpt2":
        return usual | {
            "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": m.layers, "n_head": m.heads,
            "n_embd": m.width, "n_inner": m.ffn, "n_positions": m.context, "n_ctx": m.context,
            "activation_function": "gelu_new", "layer_norm_epsilon": m.eps, "resid_pdrop": m.dropout,
            "embd_pdrop": m.dropout, "attn_pdrop": 0.0,
        }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": m.theta}
    return usual | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": m.layers,
        "num_attention_heads": m.heads, "num_key_value_heads": m.kv_heads, "hidden_size": m.width,
        "intermediate_size": m.ffn, "max_position_embeddings": m.context, "rms_norm_eps": m.eps, "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "rope_theta": m.theta, "rope_parameters": rope,
    }  # fmt: skip


# --- in


def import_(path: str, out: str) -> ModelConfig:
    """Makes a folder of theirs a checkpoint of step 0 in the run folder ``out``; returns the model's shape.

    Training goes on from it when ``out`` of a run of that model is this folder: the moments are zero.
    """
    folder, run = Path(path), Path(out)
    m = _our_config(folder)
    tensors = _Tensors(folder)
    tensors.check(m)
    _must_be_free(run, "import")
    config = Config(out=str(run), model=m)
    step = write.step_folder(run, 0)
    try:
        record = write.write_shard(step, 0, _pieces(m, tensors))
        source: dict[str, str | int | float] = {"imported.from": str(folder), "imported.dtype": tensors.dtype}
        about = source | {"config": to_toml(config), "step": 0, "tokens": 0, "loss": float("nan")}
        write.commit(step, [record], about)
        if (folder / TOKENIZER).is_file():
            shutil.copyfile(folder / TOKENIZER, run / TOKENIZER)
    except UserError:
        write.discard(step)
        with suppress(OSError):
            run.rmdir()  # what was free is free again
        raise
    except OSError as error:
        raise UserError(f"import: {run} cannot be written ({error})") from None
    return m


def _must_be_free(folder: Path, verb: str) -> None:
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{verb}: {folder} is not empty; choose another folder, nothing there is replaced")


def _pieces(m: ModelConfig, tensors: _Tensors) -> Iterator[write.Piece]:
    for name, spec in model.parameters(m).items():
        value = np.empty(spec.shape, np.float32)
        for source in sources(m, name):
            box = value[source.first : source.end]
            theirs = tensors.read(source.name)
            if (theirs.T if source.turned else theirs).shape != box.shape:
                raise UserError(f"import: {source.name} is {list(theirs.shape)}, config.json says {list(box.shape)}")
            box[...] = theirs.T if source.turned else theirs
        yield write.Piece(name, "parameter", spec.shape, (0,) * value.ndim, value)
        value[...] = 0
        for kind in list(KINDS)[1:]:  # the moments
            yield write.Piece(name, kind, spec.shape, (0,) * value.ndim, value)


class _Tensors:
    """The tensors in a folder's safetensors files, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.library, _ = _libraries()
        names = ["model.safetensors"]
        if (folder / INDEX).is_file():
            where = _json(folder / INDEX).get("weight_map")
            if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
                raise UserError(f"import: {folder / INDEX} does not say which tensor is in which file")
            names = sorted(set(where.values()))
        self.where: dict[str, Path] = {}
        self.types: set[str] = set()
        for name in names:
            try:
                with self.library.safe_open(folder / name, framework="numpy") as file:
                    self.where |= dict.fromkeys(file.keys(), folder / name)
            except FileNotFoundError:
                raise UserError(f"import: {folder / name} is missing; its weights must be in safetensors") from None
            except (OSError, self.library.SafetensorError) as error:
                raise UserError(f"import: {folder / name} is damaged: {error}") from None
        self.bare = "wte.weight" in self.where  # as GPT-2 lies on the hub: without the prefix

    @property
    def dtype(self) -> str:
        """What they are in, if that is one type; else float32."""
        return next(iter(self.types)) if len(self.types) == 1 else "float32"

    def read(self, name: str) -> Array:
        """A tensor as float32."""
        name = self._found(name)
        with self.library.safe_open(self.where[name], framework="numpy") as file:
            kind = file.get_slice(name).get_dtype()
            if kind not in DTYPES:
                raise UserError(f"import: {name} is {kind}; F32, F16 and BF16 can be read")
            self.types.add(DTYPES[kind])
            found: Array = file.get_tensor(name).astype(np.float32)
            return found

    def _found(self, name: str) -> str:
        name = name.removeprefix("transformer.") if self.bare else name
        if name not in self.where:
            raise UserError(f"import: {name} is in none of the safetensors files; is it another kind of model?")
        return name

    def check(self, m: ModelConfig) -> None:
        """Refuses a model of which something is missing, or would be left over."""
        used = {self._found(source.name) for name in model.parameters(m) for source in sources(m, name)}
        used |= {"lm_head.weight"} if m.tied else set()
        left = [name for name in self.where if name not in used and not BUFFERS.fullmatch(name)]
        if left:
            raise UserError(f"import: {len(left)} tensors are no part of this model, {left[0]} for one")


def _our_config(folder: Path) -> ModelConfig:
    """The shape in config.json; UserError for what this program would compute differently."""
    c = _json(folder / CONFIG)
    kind = c.get("model_type")
    try:
        if kind == "gpt2":
            _must(c, "activation_function", ("gelu_new", "gelu_pytorch_tanh"), "gelu_new")
            _must(c, "scale_attn_by_inverse_layer_idx", (False,), False)
            _must(c, "scale_attn_weights", (True,), True)
            m = ModelConfig(
                family="gpt2", layers=c["n_layer"], heads=c["n_head"], width=c["n_embd"], ffn=c.get("n_inner") or 0,
                context=c["n_positions"], vocab=c["vocab_size"], tied=c.get("tie_word_embeddings", True),
                eps=c.get("layer_norm_epsilon", 1e-5),
            )  # fmt: skip
        elif kind in ("llama", "mistral"):
            for key in ("attention_bias", "mlp_bias"):
                _must(c, key, (False,), False)
            _must(c, "hidden_act", ("silu",), "silu")
            _must(c, "rope_scaling", (None,), None)
            rope = c.get("rope_parameters") or {}
            _must(rope, "rope_type", ("default",), "default")
            window = c.get("sliding_window") or c["max_position_embeddings"]
            heads, width = c["num_attention_heads"], c["hidden_size"]
            _must(c, "head_dim", (width // heads, None), None)
            m = ModelConfig(
                family="llama", layers=c["num_hidden_layers"], heads=heads,
                kv_heads=c.get("num_key_value_heads") or heads, width=width, ffn=c["intermediate_size"],
                context=min(c["max_position_embeddings"], window), vocab=c["vocab_size"],
                tied=c.get("tie_word_embeddings", False), eps=c.get("rms_norm_eps", 1e-6),
                theta=float(c.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            )  # fmt: skip
        else:
            raise UserError(f"import: {folder / CONFIG} is of a {kind}; gpt2, llama and mistral can be read")
        for key in ("layers", "heads", "kv_heads", "width", "ffn", "context", "vocab"):
            if not isinstance(getattr(m, key), int):
                raise TypeError(f"{key} is {getattr(m, key)!r}")
        return model.resolve(m)
    except KeyError as error:
        raise UserError(f"import: {folder / CONFIG} does not say {error.args[0]}") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"import: {folder / CONFIG} has a size that is none ({error})") from None


def _must(config: Mapping[str, Any], key: str, values: tuple[Any, ...], usual: Any) -> None:
    if config.get(key, usual) not in values:
        raise UserError(f"import: config.json has {key} = {config[key]!r}, which this program does not compute")


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"import: {file} cannot be read ({error.strerror}); give a model's folder") from None
    except ValueError as error:
        raise UserError(f"import: {file} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"import: {file} holds no table")
    return found


def toml(m: ModelConfig) -> str:
    """The [model] table of a run that goes on from an import."""
    usual = asdict(ModelConfig())
    lines = [f"{key} = {json.dumps(value)}" for key, value in asdict(m).items() if value != usual[key]]
    return "\n".join(["[model]", *lines])


def _libraries() -> tuple[Any, Any]:
    """safetensors, and the types that numpy lacks, which it reads and writes."""
    try:
        import ml_dtypes
        import safetensors.numpy
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'hpcpipe[hugging-face]'") from None
    return safetensors, ml_dtypes
