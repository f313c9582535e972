"""The kernel table: the one contract between layers, planner and every backend.

A row names a kernel, its arguments with shapes, and its floating-point operations. From the row come
the recorder's output shapes, the planner's price, the C prototype (held against ``hpcpipe.h`` by a
test) and the dispatch code of the native library. Plain Python, standard library only: ``setup.py``
loads this file before anything else is installed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

# Element types: "r" is the backend's real type (float32, or float64 in the reference), the others are fixed; "h" is the
# upper half of a float32, a bfloat16. An argument of type "a" is of the compute type: "r", or "h" where a run computes
# on bfloat16 numbers; arithmetic and sums are of the real type all the same.
C_TYPES = {"r": "float", "a": "float", "h": "uint16_t", "i": "int32_t", "l": "int64_t", "d": "double"}
SIZES = {"r": 4, "h": 2, "i": 4, "l": 8, "d": 8}

_ARG = re.compile(r"(?P<name>\w+)(?::(?P<type>[ahild]))?(?P<mark>[+~])?(?P<optional>\?)?\[(?P<shape>[^\]]*)\]")
_ROLES = {"+": "inout", "~": "scratch"}


class Arg(NamedTuple):
    """One buffer argument: ``role`` is out (overwritten), in (read), inout (read and written) or scratch (room)."""

    name: str
    role: str
    type: str
    shape: tuple[str, ...]
    optional: bool


class Kernel(NamedTuple):
    """One row. Argument order everywhere: outs, ins, dims, ints, reals, work."""

    name: str
    outs: tuple[Arg, ...]
    ins: tuple[Arg, ...]
    dims: tuple[str, ...]
    ints: tuple[str, ...]
    reals: tuple[str, ...]
    flops: Callable[[Mapping[str, int]], float]
    work: str  # bytes of scratch per thread, an expression over dims and ints; "" for none
    device: str  # the same on a GPU, in all

    @property
    def buffers(self) -> tuple[Arg, ...]:
        return self.outs + self.ins


def _parse(text: str, role: str) -> tuple[Arg, ...]:
    found = list(_ARG.finditer(text))
    if "".join(m.group(0) for m in found) != text.replace(" ", ""):
        raise ValueError(f"kernel table: cannot read the arguments {text!r}")
    return tuple(
        Arg(
            m["name"],
            _ROLES.get(m["mark"], role),
            m["type"] or "r",
            tuple(m["shape"].split(",")),
            bool(m["optional"]),
        )
        for m in found
    )


def _row(
    name: str,
    outs: str,
    ins: str,
    dims: str,
    flops: str,
    ints: str = "",
    reals: str = "",
    work: str = "",
    device: str = "",
) -> Kernel:
    code = compile(flops, f"<flops of {name}>", "eval")
    return Kernel(
        name,
        _parse(outs, "out"),
        _parse(ins, "in"),
        tuple(dims.split()),
        tuple(ints.split()),
        tuple(reals.split()),
        lambda env: float(eval(code, {"min": min}, dict(env))),
        work,
        device,
    )


def _product(m: str, k: str) -> str:
    """Scratch of a product with m rows and a depth of k: HP_PRODUCT_WORK of product.h."""
    return f"4*min({k},768)*(min({m}+12,1032)+96)"


# Letters: n tokens of a microbatch (b sequences of t), c channels in, o channels out, f feed-forward width,
# v vocabulary, s learned positions, h query heads, k key/value heads, d head width. Matrices are row-major, weights are
# [out, in].
# attention: the causal half is counted once; flops are what the mathematics needs, not what a blocked kernel pads.
_ATTENTION_WORK = "4*(2*72*(t+32)+(3*(t+32)+4*72)*(d+32))"  # two blocks of scores and panels, see attention.c
_COLUMNS = "4*c*min(128, (n+31)//32)"  # on a GPU: a sum over rows, first of at most so many blocks of them
# fmt: off
TABLE: tuple[Kernel, ...] = (
    # y = x wᵀ + b + z;  dx = dy w;  dw += dyᵀ x, db += Σ dy
    _row("linear_fwd", "y:a[n,o]", "x:a[n,c] w:a[o,c] b:a?[o] z:a?[n,o]", "n o c", "2*n*o*c", work=_product("n", "c")),
    _row("linear_dx", "dx:a[n,c]", "dy:a[n,o] w:a[o,c]", "n o c", "2*n*o*c", work=_product("n", "o")),
    _row("linear_dw", "", "dw+[o,c] db+?[o] dy:a[n,o] x:a[n,c]", "n o c", "2*n*o*c", work=_product("o", "n"),
         device="4*o*((n+255)//256)"),
    # y = w[ids];  dw[ids] += dy
    _row("embedding_fwd", "y:a[n,c]", "ids:i[n] w:a[v,c]", "n v c", "0"),
    _row("embedding_dw", "", "dw+[v,c] dy:a[n,c] ids:i[n]", "n v c", "n*c"),
    # row i is position i % t:  y = x + w[i % t];  dw[i % t] += dy
    _row("position_fwd", "y:a[n,c]", "x:a[n,c] w:a[s,c]", "n s c", "n*c", ints="t"),
    _row("position_dw", "", "dw+[s,c] dy:a[n,c]", "n s c", "n*c", ints="t"),
    # y = (x - mean) rstd w + b;  dx += z, the gradient that comes around the layer
    _row("layernorm_fwd", "y:a[n,c] mean[n] rstd[n]", "x:a[n,c] w[c] b[c]", "n c", "8*n*c", reals="eps"),
    _row("layernorm_dx", "dx:a[n,c]", "dy:a[n,c] x:a[n,c] w[c] mean[n] rstd[n] z:a?[n,c]", "n c", "11*n*c"),
    _row("layernorm_dw", "", "dw+[c] db+[c] dy:a[n,c] x:a[n,c] mean[n] rstd[n]", "n c", "5*n*c",
         device=f"2*{_COLUMNS}"),
    # y = x rstd w,  rstd = 1/sqrt(mean(x²) + eps)
    _row("rmsnorm_fwd", "y:a[n,c] rstd[n]", "x:a[n,c] w[c]", "n c", "4*n*c", reals="eps"),
    _row("rmsnorm_dx", "dx:a[n,c]", "dy:a[n,c] x:a[n,c] w[c] rstd[n] z:a?[n,c]", "n c", "8*n*c"),
    _row("rmsnorm_dw", "", "dw+[c] dy:a[n,c] x:a[n,c] rstd[n]", "n c", "3*n*c", device=_COLUMNS),
    # tanh form, as GPT-2 uses it; dx gives y again, so that nobody has to keep it
    _row("gelu_fwd", "y:a[n,c]", "x:a[n,c]", "n c", "9*n*c"),
    _row("gelu_dx", "dx:a[n,c] y:a[n,c]", "dy:a[n,c] x:a[n,c]", "n c", "18*n*c"),
    # x = [gate | up]:  y = silu(gate) up
    _row("swiglu_fwd", "y:a[n,f]", "x:a[n,2*f]", "n f", "6*n*f"),
    _row("swiglu_dx", "dx:a[n,2*f] y:a[n,f]", "dy:a[n,f] x:a[n,2*f]", "n f", "13*n*f"),
    # rotates, in place, the first h + k heads of qkv = [q | k | v]; halves (i, i + d/2) turn by (row % t) theta^(-2i/d)
    _row("rope_fwd", "", "qkv:a+[n,(h+2*k)*d]", "n", "3*n*(h+k)*d", ints="t h k d", reals="theta"),
    _row("rope_dx", "", "dqkv:a+[n,(h+2*k)*d]", "n", "3*n*(h+k)*d", ints="t h k d", reals="theta"),
    # causal, grouped queries (h % k == 0), scores / sqrt(d); lse[i,head] = log Σ exp(scores), natural logarithm
    _row("attention_fwd", "y:a[n,h*d] lse[n,h]", "qkv:a[n,(h+2*k)*d]", "n", "2*n*(t+1)*h*d",
         ints="t h k d", work=_ATTENTION_WORK),
    _row("attention_dx", "dqkv:a[n,(h+2*k)*d]", "dy:a[n,h*d] y:a[n,h*d] lse[n,h] qkv:a[n,(h+2*k)*d]", "n",
         "5*n*(t+1)*h*d", ints="t h k d", work=_ATTENTION_WORK, device="4*n*h"),
    _row("add_fwd", "y:a[n,c]", "a:a[n,c] b:a[n,c]", "n c", "n*c"),
    # y = x mask / (1 - p);  mask from (key, salt, element);  key = [seed, step, sample, on]: on == 0 copies
    _row("dropout_fwd", "y:a[n,c]", "x:a[n,c] key:l[4]", "n c", "2*n*c", ints="salt", reals="p"),
    # logits = x wᵀ, r tokens at a time: loss = Σ -log softmax(logits)[target];  dlogits = scale (softmax - onehot);
    # dx = dlogits w;  dw += dlogitsᵀ x;  key[3] == 0: the loss alone, dx = 0.
    _row("linearcrossentropy_fwd", "loss:d[1] nll[n] dx:a[n,c] logits:a~[r,v]",
         "dw+[v,c] x:a[n,c] w:a[v,c] targets:i[n] key:l[4]", "n v c", "6*n*v*c + 6*n*v", ints="r", reals="scale",
         work=f"max({_product('r', 'c')}, {_product('r', 'v')}, {_product('v', 'r')})"),
    # x is rounded to bfloat16, where it is and in half the bytes;  y is what those mean
    _row("narrow", "y:h[n,c]", "x+[n,c]", "n c", "0"),
    _row("widen", "y[n,c]", "x:h[n,c]", "n c", "0"),
    # y is x rounded to bfloat16, x stays:  what products read of a parameter
    _row("halve", "y:h[n]", "x[n]", "n", "0"),
    # acc += x;  s = Σ x² in float64, blocks of a fixed size, so that no thread count changes a bit
    _row("accumulate", "", "acc+[n] x[n]", "n", "n"),
    _row("sumsq", "s:d[1]", "x[n]", "n", "2*n", device="8*min(1024, (n+16383)//16384)"),
    # AdamW (Loshchilov & Hutter 2019), clears the gradient behind itself
    # hyper = [lr, beta1, beta2, eps, 1 - beta1^step, 1 - beta2^step, gradient scale, unused];  half = p as bfloat16
    _row("adamw_step", "", "p+[n] g+[n] m+[n] v+[n] half:h+?[n] hyper:d[8]", "n", "14*n", reals="decay"),
    # the same in two halves: the new p, with the old one kept; then, when it is known to stay, the moments
    _row("adamw_try", "old[n]", "p+[n] g[n] m[n] v[n] half:h+?[n] hyper:d[8]", "n", "14*n", reals="decay"),
    _row("adamw_keep", "", "g+[n] m+[n] v+[n] hyper:d[8]", "n", "6*n"),
)
# fmt: on
BY_NAME: dict[str, Kernel] = {k.name: k for k in TABLE}


def bind(kernel: Kernel, shapes: Mapping[str, tuple[int, ...] | None], ints: Mapping[str, int]) -> dict[str, int]:
    """Dimension letters from the input shapes (None for an absent optional); ValueError where they do not fit."""
    env: dict[str, int] = dict(ints)
    for arg in kernel.ins:
        shape = shapes[arg.name]
        if shape is None:
            continue
        if len(shape) != len(arg.shape):
            raise ValueError(f"{kernel.name}: {arg.name} has shape {shape}, the table says [{','.join(arg.shape)}]")
        for expression, size in zip(arg.shape, shape, strict=True):
            factor, _, letter = expression.rpartition("*")
            if letter.isidentifier() and letter not in env and (not factor or factor.isdigit()):
                env[letter] = size // int(factor or 1)
    for whole, part in (("h", "k"), ("n", "t")):
        if whole in env and part in kernel.ints and env[whole] % env[part]:
            raise ValueError(f"{kernel.name}: {whole} = {env[whole]} is not a multiple of {part} = {env[part]}")
    for arg in kernel.ins:
        shape = shapes[arg.name]
        expected = shape_of(arg, env)
        if shape is not None and expected != tuple(shape):
            raise ValueError(f"{kernel.name}: {arg.name} has shape {tuple(shape)}, expected {expected}")
    return env


def shape_of(arg: Arg, env: Mapping[str, int]) -> tuple[int, ...]:
    """The concrete shape of one argument under bound letters."""
    return tuple(evaluate(expression, env) for expression in arg.shape)


def evaluate(expression: str, env: Mapping[str, int]) -> int:
    """A table expression (``h*d``) over bound letters."""
    return int(env[expression]) if expression in env else int(eval(expression, {}, dict(env)))


MOVES = {"out": 1, "in": 1, "inout": 2, "scratch": 0}


def prototype(kernel: Kernel) -> str:
    """The C declaration of a row, exactly as ``hpcpipe.h`` must hold it."""
    parts = [f"{'const ' if a.role == 'in' else ''}{C_TYPES[a.type]} *{a.name}" for a in kernel.buffers]
    parts += [f"int64_t {d}" for d in kernel.dims + kernel.ints]
    parts += [f"float {r}" for r in kernel.reals]
    parts += ["void *work"] if kernel.work else []
    return f"void hp_{kernel.name}({', '.join(parts)});"


def digest() -> str:
    """Names the contract; compiled into the native library and compared when it is loaded."""
    text = "\n".join(prototype(k) + k.work for k in TABLE)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def dispatch_source() -> str:
    """C source of ``hp_dispatch``: one switch case per row that unpacks a recorded call."""
    lines = ['#include "hpcpipe.h"', f'const char *hp_table_digest(void) {{ return "{digest()}"; }}']
    lines += [
        "void hp_dispatch(const hp_call *call, char *arena, const int64_t *bases, void *work) {",
        "  const hp_arg *a = call->args; (void)work;",
        "  switch (call->kernel) {",
    ]
    for index, kernel in enumerate(TABLE):
        nb, nd = len(kernel.buffers), len(kernel.dims + kernel.ints)
        values = [f"hp_pointer(&a[{i}], arena, bases)" for i in range(nb)]
        values += [f"a[{nb + i}].value.i" for i in range(nd)]
        values += [f"(float)a[{nb + nd + i}].value.r" for i in range(len(kernel.reals))]
        values += ["work"] if kernel.work else []
        lines.append(f"  case {index}: hp_{kernel.name}({', '.join(values)}); return;")
    return "\n".join([*lines, "  }", "}", ""])
