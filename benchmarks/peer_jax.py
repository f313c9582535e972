"""The JAX competitor: one jitted training step with donated state, on all cores of the mask or a GPU.

Variants, joined by "-": ``unroll`` or ``scan`` over the layers, ``dpa`` (jax.nn.dot_product_attention) or ``einsum``
attention, ``gather`` or ``onehot`` embedding (the gradient of a gather is a serial scatter on the CPU).
Compare them on a quiet machine with ``--competitors jax:scan-dpa-gather jax:…``. Matrices are kept as [in, out].
On a GPU: bfloat16 copies of float32 parameters, cuDNN's attention; statistics, softmax of the loss and sums in float32.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.shape import OPTIMIZER, THETA, Job, Shape
from benchmarks.worker import More, Run, serve

DEFAULT = "unroll-dpa-gather"
Tree = dict[str, Any]


def parameters_of(job: Job, scan: bool) -> Tree:
    """The job's weights as a tree; layers as a list, or stacked for a scan."""

    def array(name: str) -> jax.Array:
        w = job.weights[name]
        return jnp.array(w.T if w.ndim == 2 and not name.startswith("embed") else w)

    names = [n.removeprefix("layer.0.") for n in job.weights if n.startswith("layer.0.")]
    layers: Any = [{n: array(f"layer.{i}.{n}") for n in names} for i in range(job.shape.layers)]
    layers = jax.tree.map(lambda *ws: jnp.stack(ws), *layers) if scan else layers
    return {"layers": layers, **{n: array(n) for n in job.weights if not n.startswith("layer.")}}


def layernorm(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.square(wide - mean).mean(-1, keepdims=True)
    return ((wide - mean) * jax.lax.rsqrt(variance + 1e-5) * w + b).astype(x.dtype)


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal; on a GPU nothing but cuDNN may do it."""
    kind = "cudnn" if jax.default_backend() == "gpu" else None
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=kind)


def attention(qkv: jax.Array, heads: int, kind: str) -> jax.Array:
    """Causal attention, [b, t, 3 c] -> [b, t, c]."""
    b, t, c3 = qkv.shape
    d = c3 // 3 // heads
    q, k, v = jnp.moveaxis(qkv.reshape(b, t, 3, heads, d), 2, 0)
    if kind == "dpa":
        return attend(q, k, v).reshape(b, t, heads * d)
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(d)
    scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v).reshape(b, t, heads * d)


def rmsnorm(x: jax.Array, w: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-5) * w).astype(x.dtype)


def rotate(x: jax.Array) -> jax.Array:
    """Turns the pairs (i, i + d/2) of [b, t, heads, d] by t theta^(-2i/d)."""
    t, d = x.shape[1], x.shape[3]
    angles = np.outer(np.arange(t), THETA ** (np.arange(0, d, 2) / -d))
    cosine, sine = (jnp.array(f(angles), jnp.float32)[:, None] for f in (np.cos, np.sin))
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cosine - b * sine, b * cosine + a * sine], -1).astype(x.dtype)


def llama_block(x: jax.Array, p: Tree, shape: Shape, kind: str) -> jax.Array:
    b, t, c = x.shape
    h, k = shape.heads, shape.kv_heads
    heads = (rmsnorm(x, p["norm1.weight"]) @ p["attention.qkv.weight"]).reshape(b, t, h + 2 * k, c // h)
    q, keys, values = rotate(heads[:, :, :h]), rotate(heads[:, :, h : h + k]), heads[:, :, h + k :]
    if kind != "dpa":
        raise ValueError("Llama has the dpa attention only")
    y = attend(q, keys, values).reshape(b, t, c)
    x = x + y @ p["attention.out.weight"]
    gate, up = jnp.split(rmsnorm(x, p["norm2.weight"]) @ p["mlp.gate_up.weight"], 2, -1)
    return x + (jax.nn.silu(gate) * up) @ p["mlp.down.weight"]


def block(x: jax.Array, p: Tree, shape: Shape, kind: str) -> jax.Array:
    if shape.kv_heads:
        return llama_block(x, p, shape, kind)
    heads = shape.heads
    qkv = layernorm(x, p["norm1.weight"], p["norm1.bias"]) @ p["attention.qkv.weight"] + p["attention.qkv.bias"]
    x = x + attention(qkv, heads, kind) @ p["attention.out.weight"] + p["attention.out.bias"]
    up = layernorm(x, p["norm2.weight"], p["norm2.bias"]) @ p["mlp.up.weight"] + p["mlp.up.bias"]
    return x + jax.nn.gelu(up, approximate=True) @ p["mlp.down.weight"] + p["mlp.down.bias"]


def loss_of(p: Tree, batch: jax.Array, shape: Shape, settings: tuple[str, str, str]) -> jax.Array:
    """Mean cross-entropy of a batch [b, t + 1]."""
    depth, kind, lookup = settings
    ids, targets = batch[:, :-1], batch[:, 1:]
    w = p["embed.weight"]
    x = jax.nn.one_hot(ids, shape.vocabulary) @ w if lookup == "onehot" else w[ids]
    x = x if shape.kv_heads else x + p["embed.position"]
    if depth == "scan":
        x, _ = jax.lax.scan(lambda x, layer: (block(x, layer, shape, kind), None), x, p["layers"])
    else:
        for layer in p["layers"]:
            x = block(x, layer, shape, kind)
    if shape.kv_heads:
        logits = rmsnorm(x, p["head.norm.weight"]) @ p["head.weight"]
    else:
        logits = layernorm(x, p["head.norm.weight"], p["head.norm.bias"]) @ w.T
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - chosen).mean()


def adamw(state: tuple[Tree, Tree, Tree, jax.Array], grads: Tree) -> tuple[Tree, Tree, Tree, jax.Array]:
    """Clips by the global norm, then AdamW with decoupled decay of matrices."""
    o, (params, m, v, step) = OPTIMIZER, state
    norm = jnp.sqrt(sum(jnp.vdot(g, g, precision="highest") for g in jax.tree.leaves(grads)))
    scale = jnp.minimum(1.0, o.clip / (norm + 1e-6))
    step = step + 1
    fix1, fix2 = 1 - o.beta1**step, 1 - o.beta2**step

    def update(path: Any, p: jax.Array, g: jax.Array, m: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        g = g * scale
        m, v = o.beta1 * m + (1 - o.beta1) * g, o.beta2 * v + (1 - o.beta2) * g * g
        decay = 0.0 if "norm" in path[-1].key or "bias" in path[-1].key else o.weight_decay
        return p - o.lr * (m / fix1 / (jnp.sqrt(v / fix2) + o.eps) + decay * p), m, v

    new = jax.tree_util.tree_map_with_path(update, params, grads, m, v)
    params, m, v = jax.tree.transpose(jax.tree.structure(params), jax.tree.structure((0, 0, 0)), new)
    return params, m, v, step


def halved(params: Tree) -> Tree:
    """bfloat16 copies of all parameters but the norms'."""

    def copy(path: Any, p: jax.Array) -> jax.Array:
        return p if "norm" in path[-1].key else p.astype(jnp.bfloat16)

    return jax.tree_util.tree_map_with_path(copy, params)


def gradient_of(job: Job, settings: tuple[str, str, str]) -> Callable[[Tree, jax.Array], tuple[jax.Array, Tree]]:
    """(parameters, batch) -> (loss, gradients), microbatch after microbatch."""
    shape, half, pieces = job.shape, job.device != "cpu", job.pieces

    def loss(params: Tree, batch: jax.Array) -> jax.Array:
        return loss_of(halved(params) if half else params, batch, shape, settings)

    def whole(params: Tree, batch: jax.Array) -> tuple[jax.Array, Tree]:
        def add(sums: Any, piece: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss)(params, piece)), None

        zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
        sums, _ = jax.lax.scan(add, zeros, batch.reshape(pieces, -1, batch.shape[-1]))
        return jax.tree.map(lambda each: each / pieces, sums)

    return whole if pieces > 1 else jax.value_and_grad(loss)


def build(job: Job, threads: int, variant: str) -> tuple[Run, str, More]:
    """The training loop of one variant. XLA takes its number of threads from the affinity mask."""
    cuda = job.device == "cuda"
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # others are on the GPU, too
    jax.config.update("jax_platforms", "cuda" if cuda else "cpu")
    jax.config.update("jax_default_matmul_precision", None if cuda else "highest")
    variant = variant or DEFAULT
    depth, kind, lookup = variant.split("-")
    params = parameters_of(job, depth == "scan")
    zeros = [jax.tree.map(jnp.zeros_like, params) for _ in range(2)]
    state = (params, *zeros, jnp.zeros((), jnp.float32))
    batches = [jnp.array(batch) for batch in job.tokens]
    gradient = gradient_of(job, (depth, kind, lookup))

    def train_step(state: Any, batch: jax.Array) -> tuple[Any, jax.Array]:
        loss, grads = gradient(state[0], batch)
        return adamw(state, grads), loss

    compiled = jax.jit(train_step, donate_argnums=0).lower(state, batches[0]).compile()
    del params, zeros

    def run(first: int, count: int) -> list[float]:
        nonlocal state
        losses = []
        for step in range(first, first + count):
            state, loss = compiled(state, batches[step % len(batches)])
            losses.append(loss)
        jax.block_until_ready(state)
        return [float(loss) for loss in losses]

    def more() -> dict[str, float]:
        told = jax.devices()[0].memory_stats() if cuda else None
        return {"device_bytes": float(told["peak_bytes_in_use"])} if told else {}

    where = f"{jax.devices()[0].device_kind}, cuDNN attention, bfloat16" if cuda else f"{threads} threads"
    return run, f"jax {jax.__version__}, {variant}, {where}", more


if __name__ == "__main__":
    serve(build)
