"""What every competitor trains: a GPT-2 or Llama shape, its initial weights, tokens and optimizer, from one file.

The driver writes the file once per shape; each worker reads it, so that all train the same model on the same tokens and
their losses can be compared. Needs numpy only, because the peers live in an environment of their own.
Parameter names and layouts are those of hpcpipe's checkpoints: matrices are [out, in], tokens are int32.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BATCHES = 16  # distinct batches in the file; step s trains on batch s % BATCHES
STD = 0.02  # as GPT-2: a larger one saturates the softmax, fills the backward pass with denormals and slows the peers


class Optimizer(NamedTuple):
    """AdamW at a constant rate; matrices (embeddings too) decay, norms and biases do not."""

    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0  # global L2 norm of the gradient


OPTIMIZER = Optimizer()
THETA = 10000.0  # base of Llama's rotary angles


class Shape(NamedTuple):
    """A model and its batch: GPT-2 (LayerNorm, biases, tanh GELU, learned positions, tied embeddings, no dropout), or,
    with key/value heads, Llama (RMSNorm, rotary positions, SwiGLU, grouped queries, untied).
    """

    layers: int
    heads: int
    width: int
    length: int  # tokens of a sequence
    sequences: int  # sequences of a step
    vocabulary: int
    kv_heads: int = 0  # 0: GPT-2

    @property
    def ffn(self) -> int:
        """Width of the feed-forward half; Llama's is 8/3 of the width in whole 64s."""
        return -(-8 * self.width // (3 * 64)) * 64 if self.kv_heads else 4 * self.width

    @property
    def qkv(self) -> int:
        """Rows of the fused projection to queries, keys and values."""
        return (self.heads + 2 * (self.kv_heads or self.heads)) * (self.width // self.heads)

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.length * self.sequences

    @property
    def flops(self) -> float:
        """FLOPs of one step: matrix products only, a multiply-add is two, backward is twice forward.

        The causal half of attention is counted once and nothing recomputed is counted, so the number is the same for
        every competitor: forward, per token, two for each weight of the layers' matrices and of the head (GPT-2 has
        12 L c² + c v), and 2 L (t + 1) c in attention.
        """
        c, t = self.width, self.length
        layer = (self.qkv + c + (3 if self.kv_heads else 2) * self.ffn) * c
        forward = 2 * (self.layers * layer + c * self.vocabulary) + 2 * self.layers * (t + 1) * c
        return 3.0 * forward * self.tokens

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, in the order of execution."""
        c, shapes = self.width, {}
        shapes["embed.weight"] = (self.vocabulary, c)
        if not self.kv_heads:
            shapes["embed.position"] = (self.length, c)
        for i in range(self.layers):
            for name, shape in (_llama if self.kv_heads else _gpt2)(self).items():
                shapes[f"layer.{i}.{name}"] = shape
        shapes["head.norm.weight"] = (c,)
        if self.kv_heads:
            shapes["head.weight"] = (self.vocabulary, c)
        else:
            shapes["head.norm.bias"] = (c,)
        return shapes

    def __str__(self) -> str:
        return ",".join(str(size) for size in (self if self.kv_heads else self[:-1]))


def _llama(shape: Shape) -> dict[str, tuple[int, ...]]:
    c, f = shape.width, shape.ffn
    return {
        "norm1.weight": (c,), "attention.qkv.weight": (shape.qkv, c), "attention.out.weight": (c, c),
        "norm2.weight": (c,), "mlp.gate_up.weight": (2 * f, c), "mlp.down.weight": (c, f),
    }  # fmt: skip


def _gpt2(shape: Shape) -> dict[str, tuple[int, ...]]:
    c = shape.width
    return {
        "norm1.weight": (c,), "norm1.bias": (c,),
        "attention.qkv.weight": (3 * c, c), "attention.qkv.bias": (3 * c,),
        "attention.out.weight": (c, c), "attention.out.bias": (c,),
        "norm2.weight": (c,), "norm2.bias": (c,),
        "mlp.up.weight": (4 * c, c), "mlp.up.bias": (4 * c,),
        "mlp.down.weight": (c, 4 * c), "mlp.down.bias": (c,),
    }  # fmt: skip


def arguments(name: str, doc: str | None, quick: str, rounds: str) -> argparse.ArgumentParser:
    """What a contest over shapes can be told: ``quick`` says what that leaves out, ``rounds`` their usual number."""
    parser = argparse.ArgumentParser(prog=name, description=(doc or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes everything that was measured")
    parser.add_argument("--shape", type=parse, action="append", metavar="L,H,C,T,B,V[,K]")
    parser.add_argument("--rounds", type=int, help=f"default {rounds}, or 3 with --quick")
    return parser


def parse(text: str) -> Shape:
    """A shape from ``layers,heads,width,length,sequences,vocabulary[,kv_heads]``; raises ValueError with a sentence."""
    parts = text.split(",")
    if len(parts) not in (6, 7) or not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        fields = ",".join(Shape._fields)
        raise ValueError(f"a shape is six positive integers, or seven for Llama, {fields}, got {text!r}")
    shape = Shape(*(int(p) for p in parts))
    if shape.kv_heads and shape.heads % shape.kv_heads:
        raise ValueError(f"{shape.heads} heads do not divide by {shape.kv_heads} key/value heads")
    if shape.width % shape.heads:
        raise ValueError(f"width {shape.width} is not a multiple of {shape.heads} heads")
    return shape


def initial_weights(shape: Shape, seed: int) -> dict[str, NDArray[np.float32]]:
    """GPT-2's initialisation: normal(0.02), residual projections by 1/sqrt(2 L) smaller, norms 1, biases 0."""
    rng = np.random.default_rng(seed)
    weights: dict[str, NDArray[np.float32]] = {}
    for name, size in shape.parameters.items():
        if len(size) == 1:
            weights[name] = np.full(size, float("norm" in name and name.endswith("weight")), np.float32)
            continue
        residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
        std = STD / np.sqrt(2 * shape.layers) if residual else STD
        weights[name] = rng.standard_normal(size, np.float32) * np.float32(std)
    return weights


def synthetic_tokens(shape: Shape, seed: int) -> NDArray[np.int32]:
    """Tokens [BATCHES, sequences, length + 1] that can be learned: three of four follow from the one before."""
    rng = np.random.default_rng(seed)
    rows, v = BATCHES * shape.sequences, shape.vocabulary
    follows = rng.permutation(v)
    tokens = rng.integers(v, size=(rows, shape.length + 1))
    keep = rng.random(tokens.shape) < 0.75
    for i in range(shape.length):
        tokens[:, i + 1] = np.where(keep[:, i], follows[tokens[:, i]], tokens[:, i + 1])
    return tokens.reshape(BATCHES, shape.sequences, -1).astype(np.int32)


class Job(NamedTuple):
    """What a worker reads: the shape, weights by name, and tokens [BATCHES, sequences, length + 1]; where and how.

    ``device``: cpu (float32), cuda (bfloat16 with float32 master weights), or rehearsal, which is cuda's program where
    there is no GPU. ``microbatch``: sequences whose gradients are added up to a step's, 0 for what a competitor likes.
    """

    shape: Shape
    weights: dict[str, NDArray[np.float32]]
    tokens: NDArray[np.int32]
    device: str = "cpu"
    microbatch: int = 0

    @property
    def pieces(self) -> int:
        """Microbatches of a step, for a competitor that has no wish of its own."""
        return self.shape.sequences // self.microbatch if self.microbatch else 1


def write(path: Path, shape: Shape, seed: int = 1, device: str = "cpu", microbatch: int = 0) -> None:
    """Writes the job of a shape as an .npz file."""
    if microbatch and shape.sequences % microbatch:
        raise ValueError(f"{shape.sequences} sequences are not a whole number of microbatches of {microbatch}")
    np.savez(
        path, shape=np.array(shape), tokens=synthetic_tokens(shape, seed + 1), device=np.array(device),
        microbatch=np.array(microbatch), **initial_weights(shape, seed),
    )  # fmt: skip


def read(path: Path) -> Job:
    """Reads a job that ``write`` made."""
    with np.load(path) as file:
        shape = Shape(*(int(size) for size in file["shape"]))
        weights = {name: file[name] for name in shape.parameters}
        return Job(shape, weights, file["tokens"], str(file["device"]), int(file["microbatch"]))
