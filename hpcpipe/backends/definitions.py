"""The definitions: every kernel of the table as a few lines of numpy, in float32 or float64.

This file is the definition. C is checked against it, a GPU is checked against it, and it is checked against finite
differences in float64. A function takes its buffers in table order (outputs first, written in place), then the row's
integers, then its reals; dimensions are the shapes of the arrays. Nothing here is meant to be fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
# Element types; "r" may be float64 in the reference.
TYPES: dict[str, np.dtype[Any]] = {
    "r": np.dtype("float32"),
    "h": np.dtype("uint16"),
    "i": np.dtype("int32"),
    "l": np.dtype("int64"),
    "d": np.dtype("float64"),
}

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(z: Any) -> Any:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014), modulo 2^64; on Python integers or uint64 arrays."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return z ^ (z >> 31)


def dropout_mask(key: Sequence[int] | Array, salt: int, p: float, size: int) -> Array:
    """Boolean [size]: which elements are kept. The exact definition that every backend reproduces:

        mix(z):   z = (z ^ z>>30) * 0xBF58476D1CE4E5B9;  z = (z ^ z>>27) * 0x94D049BB133111EB;  z ^ z>>31
        state  = 0x9E3779B97F4A7C15
        state  = mix((state ^ word) + 0x9E3779B97F4A7C15)           for word in seed, step, sample, salt, in this order
        bits_e = mix(state + (e + 1) * 0x9E3779B97F4A7C15) >> 32    for element e = row * c + col
        keep_e = bits_e >= floor(p * 2^32)

    All arithmetic is on unsigned 64-bit integers modulo 2^64, signed words are reinterpreted (two's complement), and p
    is the float32 that the kernel received, multiplied in double (exact), so that every backend draws the same line.
    """
    state = _GOLDEN
    for word in (*key[:3], salt):
        state = _mix(((state ^ (int(word) & _WORD)) + _GOLDEN) & _WORD)
    bits = _mix(np.arange(1, size + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(state)) >> np.uint64(32)
    return np.asarray(bits >= np.uint64(int(float(np.float32(p)) * 4294967296.0)))


def dropout_fwd(y: Array, x: Array, key: Array, salt: int, p: float) -> None:
    """y = x mask / (1 - p), a dropped element is exactly 0; key = [seed, step, sample, on], and on == 0 copies x.

    1 / (1 - p) is computed once, in the real type, from the float32 p; see ``dropout_mask`` for the mask.
    """
    if key[3] == 0:
        y[...] = x
        return
    keep = dropout_mask(key, salt, p, x.size).reshape(x.shape)
    scale = x.dtype.type(1) / (x.dtype.type(1) - x.dtype.type(np.float32(p)))
    y[...] = np.where(keep, x * scale, 0)


def linear_fwd(y: Array, x: Array, w: Array, b: Array | None, z: Array | None) -> None:
    """y = x wᵀ + b + z."""
    y[...] = x @ w.T + sum(start for start in (b, z) if start is not None)


def linear_dx(dx: Array, dy: Array, w: Array) -> None:
    """dx = dy w."""
    dx[...] = dy @ w


def linear_dw(dw: Array, db: Array | None, dy: Array, x: Array) -> None:
    """dw += dyᵀ x, db += Σ_n dy."""
    dw += dy.T @ x
    if db is not None:
        db += dy.sum(axis=0)


def embedding_fwd(y: Array, ids: Array, w: Array) -> None:
    """y = w[ids]."""
    y[...] = w[ids]


def embedding_dw(dw: Array, dy: Array, ids: Array) -> None:
    """dw[ids] += dy, rows in the order of the tokens."""
    np.add.at(dw, ids, dy)


def position_fwd(y: Array, x: Array, w: Array, t: int) -> None:
    """y = x + w[row % t]."""
    y[...] = x + w[np.arange(len(x)) % t]


def position_dw(dw: Array, dy: Array, t: int) -> None:
    """dw[row % t] += dy."""
    np.add.at(dw, np.arange(len(dy)) % t, dy)


def layernorm_fwd(y: Array, mean: Array, rstd: Array, x: Array, w: Array, b: Array, eps: float) -> None:
    """y = (x - mean) rstd w + b, rstd = 1/sqrt(mean((x - mean)²) + eps) (Ba, Kiros, Hinton 2016)."""
    mean[...] = x.mean(axis=1)
    centred = x - mean[:, None]
    rstd[...] = 1 / np.sqrt((centred * centred).mean(axis=1) + eps)
    y[...] = centred * rstd[:, None] * w + b


def layernorm_dx(dx: Array, dy: Array, x: Array, w: Array, mean: Array, rstd: Array, z: Array | None) -> None:
    """With u = (x - mean) rstd and g = dy w:  dx = rstd (g - mean(g) - u mean(g u)) + z."""
    u, g = (x - mean[:, None]) * rstd[:, None], dy * w
    dx[...] = rstd[:, None] * (g - g.mean(axis=1, keepdims=True) - u * (g * u).mean(axis=1, keepdims=True))
    if z is not None:
        dx += z


def layernorm_dw(dw: Array, db: Array, dy: Array, x: Array, mean: Array, rstd: Array) -> None:
    """dw += Σ dy (x - mean) rstd, db += Σ dy."""
    dw += (dy * (x - mean[:, None]) * rstd[:, None]).sum(axis=0)
    db += dy.sum(axis=0)


def rmsnorm_fwd(y: Array, rstd: Array, x: Array, w: Array, eps: float) -> None:
    """y = x rstd w, rstd = 1/sqrt(mean(x²) + eps) (Zhang, Sennrich 2019)."""
    rstd[...] = 1 / np.sqrt((x * x).mean(axis=1) + eps)
    y[...] = x * rstd[:, None] * w


def rmsnorm_dx(dx: Array, dy: Array, x: Array, w: Array, rstd: Array, z: Array | None) -> None:
    """With u = x rstd and g = dy w:  dx = rstd (g - u mean(g u)) + z."""
    u, g = x * rstd[:, None], dy * w
    dx[...] = rstd[:, None] * (g - u * (g * u).mean(axis=1, keepdims=True))
    if z is not None:
        dx += z


def rmsnorm_dw(dw: Array, dy: Array, x: Array, rstd: Array) -> None:
    """dw += Σ dy x rstd."""
    dw += (dy * x * rstd[:, None]).sum(axis=0)


_GELU_A, _GELU_B = 0.7978845608028654, 0.044715  # sqrt(2/π), and the cubic of the tanh form


def gelu_fwd(y: Array, x: Array) -> None:
    """y = x/2 (1 + tanh(sqrt(2/π) (x + 0.044715 x³))) (Hendrycks, Gimpel 2016, the form GPT-2 uses)."""
    y[...] = 0.5 * x * (1 + np.tanh(_GELU_A * (x + _GELU_B * x * x * x)))


def gelu_dx(dx: Array, y: Array, dy: Array, x: Array) -> None:
    """dx = dy (1/2 (1 + h) + x/2 (1 - h²) sqrt(2/π) (1 + 3 0.044715 x²)), h the tanh of the forward pass; y again."""
    gelu_fwd(y, x)
    h = np.tanh(_GELU_A * (x + _GELU_B * x * x * x))
    dx[...] = dy * (0.5 * (1 + h) + 0.5 * x * (1 - h * h) * _GELU_A * (1 + 3 * _GELU_B * x * x))


def _sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def swiglu_fwd(y: Array, x: Array) -> None:
    """x = [gate | up]: y = gate sigmoid(gate) up (Shazeer 2020)."""
    gate, up = np.split(x, 2, axis=1)
    y[...] = gate * _sigmoid(gate) * up


def swiglu_dx(dx: Array, y: Array, dy: Array, x: Array) -> None:
    """With s = sigmoid(gate): dgate = dy up s (1 + gate (1 - s)), dup = dy gate s; y again."""
    swiglu_fwd(y, x)
    gate, up = np.split(x, 2, axis=1)
    s = _sigmoid(gate)
    dx[...] = np.concatenate([dy * up * s * (1 + gate * (1 - s)), dy * gate * s], axis=1)


def _rotate(qkv: Array, t: int, h: int, k: int, d: int, theta: float, sign: int) -> None:
    # Angles in float64 whatever the real type: position times frequency loses digits at long context.
    angle = np.outer(np.arange(len(qkv)) % t, float(theta) ** (-2.0 * np.arange(d // 2) / d))
    cos, sin = (f(angle)[:, None, :].astype(qkv.dtype) for f in (np.cos, np.sin))
    heads = qkv[:, : (h + k) * d].reshape(len(qkv), h + k, 2, d // 2)
    a, b = heads[:, :, 0], heads[:, :, 1]
    turned = np.stack([a * cos - sign * b * sin, b * cos + sign * a * sin], axis=2)
    qkv[:, : (h + k) * d] = turned.reshape(len(qkv), (h + k) * d)


def rope_fwd(qkv: Array, t: int, h: int, k: int, d: int, theta: float) -> None:
    """In place on q and k heads: (a, b) -> (a cos - b sin, b cos + a sin), b half a head after a (Su et al. 2021)."""
    _rotate(qkv, t, h, k, d, theta, 1)


def rope_dx(dqkv: Array, t: int, h: int, k: int, d: int, theta: float) -> None:
    """The transposed, that is the opposite, rotation, in place on the gradients of the q and k heads."""
    _rotate(dqkv, t, h, k, d, theta, -1)


def _heads(qkv: Array, t: int, h: int, k: int, d: int) -> tuple[Array, Array, Array]:
    """q [b, k, h/k, t, d], keys and values [b, k, 1, t, d] from rows of [q heads | k heads | v heads]."""
    b = len(qkv) // t
    split = qkv.reshape(b, t, h + 2 * k, d).transpose(0, 2, 1, 3)
    q = split[:, :h].reshape(b, k, h // k, t, d)
    return q, split[:, h : h + k, None], split[:, h + k :, None]


def _scores(q: Array, key: Array) -> Array:
    """[b, k, h/k, t, t] scores / sqrt(d), minus infinity where a query would see a later token."""
    t, d = q.shape[-2:]
    scores: Array = (q @ key.swapaxes(-1, -2)) * q.dtype.type(1 / np.sqrt(d))
    scores[..., np.triu(np.ones((t, t), dtype=bool), 1)] = -np.inf
    return scores


def _rows(x: Array) -> Array:
    """[b, k, h/k, t, d] -> [b*t, h*d]."""
    b, k, g, t, d = x.shape
    rows: Array = x.reshape(b, k * g, t, d).transpose(0, 2, 1, 3).reshape(b * t, k * g * d)
    return rows


def attention_fwd(y: Array, lse: Array, qkv: Array, t: int, h: int, k: int, d: int) -> None:
    """y = softmax(q kᵀ / sqrt(d)) v, causal; query head i reads key/value head i // (h/k); lse = log Σ exp(scores)."""
    q, key, value = _heads(qkv, t, h, k, d)
    scores = _scores(q, key)
    top = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    y[...] = _rows((weights / total) @ value)
    lse[...] = _rows(top + np.log(total))


def attention_dx(dqkv: Array, dy: Array, y: Array, lse: Array, qkv: Array, t: int, h: int, k: int, d: int) -> None:
    """With P = exp(S - lse), dP = dO vᵀ, D = Σ_d dO O:  dS = P (dP - D) / sqrt(d);  dq = dS k, dk = dSᵀ q, dv = Pᵀ dO.

    Keys and values sum over the query heads that share them (Dao et al. 2022, algorithm 4, unblocked).
    """
    b, g = len(qkv) // t, h // k
    q, key, value = _heads(qkv, t, h, k, d)
    do, o = (a.reshape(b, t, k, g, d).transpose(0, 2, 3, 1, 4) for a in (dy, y))
    p = np.exp(_scores(q, key) - lse.reshape(b, t, k, g).transpose(0, 2, 3, 1)[..., None])
    ds = p * (do @ value.swapaxes(-1, -2) - (do * o).sum(axis=-1, keepdims=True)) * q.dtype.type(1 / np.sqrt(d))
    dq = ds @ key
    dk = (ds.swapaxes(-1, -2) @ q).sum(axis=2, keepdims=True)
    dv = (p.swapaxes(-1, -2) @ do).sum(axis=2, keepdims=True)
    dqkv[...] = np.concatenate([_rows(dq), _rows(dk), _rows(dv)], axis=1)


def add_fwd(y: Array, a: Array, b: Array) -> None:
    """y = a + b."""
    y[...] = a + b


def linearcrossentropy_fwd(
    loss: Array, nll: Array, dx: Array, logits: Array, dw: Array, x: Array, w: Array, targets: Array, key: Array,
    r: int, scale: float,
) -> None:  # fmt: skip
    """nll = -log softmax(x wᵀ)[target], loss = Σ nll in float64;  with dlogits = scale (softmax - onehot):
    dx = dlogits w, dw += dlogitsᵀ x.

    A row whose target is negative counts for nothing: no loss, no gradient. key[3] == 0: the loss alone, dx = 0.
    ``logits`` is room for r rows, which the definition leaves alone.
    """
    rows, ignored = np.arange(len(x)), targets < 0
    scores = x @ w.T
    scores -= scores.max(axis=1, keepdims=True)
    chosen = scores[rows, targets]
    np.exp(scores, out=scores)
    total = scores.sum(axis=1, keepdims=True)
    nll[...] = np.where(ignored, 0, np.log(total[:, 0]) - chosen)
    loss[0] = nll.sum(dtype=np.float64)
    if key[3] == 0:
        dx[...] = 0
        return
    scores /= total
    scores[rows, targets] -= 1
    scores *= scores.dtype.type(scale)
    scores[ignored] = 0
    dx[...] = scores @ w
    dw += scores.T @ x


def narrow(y: Array, x: Array) -> None:
    """x to the nearest bfloat16 (the upper half of a float32), ties to even; y are its bits, uint16."""
    halve(y, x)
    widen(x, y)


def halve(y: Array, x: Array) -> None:
    """y are the bits of the bfloat16 nearest to x, ties to even, uint16; x stays."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    y[...] = np.where(np.isnan(x), bits >> 16 | 0x40, rounded)


def widen(y: Array, x: Array) -> None:
    """The numbers whose bits as bfloat16 are x."""
    y[...] = (x.astype(np.uint32) << 16).view(np.float32)


def accumulate(acc: Array, x: Array) -> None:
    """acc += x."""
    acc += x


def sumsq(s: Array, x: Array) -> None:
    """s = Σ x² in float64."""
    s[0] = np.square(x, dtype=np.float64).sum()


def _moments(g: Array, m: Array, v: Array, hyper: Array) -> tuple[Array, Array]:
    """g' = scale g;  beta1 m + (1 - beta1) g';  beta2 v + (1 - beta2) g'²."""
    real = g.dtype.type
    (b1, r1), (b2, r2) = ((real(hyper[i]), real(1 - hyper[i])) for i in (1, 2))
    scaled = real(hyper[6]) * g
    return b1 * m + r1 * scaled, b2 * v + r2 * scaled * scaled


def _stepped(p: Array, m: Array, v: Array, hyper: Array, decay: float) -> Array:
    """p - lr (m/c1 / (sqrt(v/c2) + eps) + decay p)."""
    real = p.dtype.type
    lr, eps, c1, c2 = (real(hyper[i]) for i in (0, 3, 4, 5))
    moved: Array = p - lr * (m / c1 / (np.sqrt(v / c2) + eps) + real(decay) * p)
    return moved


def adamw_step(p: Array, g: Array, m: Array, v: Array, half: Array | None, hyper: Array, decay: float) -> None:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2); hyper = [lr, beta1, beta2, eps, c1, c2, scale, unused].

    With c1 = 1 - beta1^step and c2 = 1 - beta2^step:
    g' = scale g;  m = beta1 m + (1 - beta1) g';  v = beta2 v + (1 - beta2) g'²;
    p -= lr (m/c1 / (sqrt(v/c2) + eps) + decay p);  g = 0;  half, where there is one, is the new p as bfloat16.
    """
    m[...], v[...] = _moments(g, m, v, hyper)
    p[...] = _stepped(p, m, v, hyper, decay)
    g[...] = 0
    if half is not None:
        halve(half, p)


def adamw_try(
    old: Array, p: Array, g: Array, m: Array, v: Array, half: Array | None, hyper: Array, decay: float
) -> None:
    """old = p, then p and half as ``adamw_step`` makes them; m, v and g stay as they are."""
    old[...] = p
    p[...] = _stepped(p, *_moments(g, m, v, hyper), hyper, decay)
    if half is not None:
        halve(half, p)


def adamw_keep(g: Array, m: Array, v: Array, hyper: Array) -> None:
    """The rest of ``adamw_step`` after ``adamw_try``: m and v as there, g = 0."""
    m[...], v[...] = _moments(g, m, v, hyper)
    g[...] = 0


FUNCTIONS: dict[str, Callable[..., None]] = {
    f.__name__: f
    for f in (
        linear_fwd, linear_dx, linear_dw, embedding_fwd, embedding_dw, position_fwd, position_dw, layernorm_fwd,
        layernorm_dx, layernorm_dw, rmsnorm_fwd, rmsnorm_dx, rmsnorm_dw, gelu_fwd, gelu_dx, swiglu_fwd, swiglu_dx,
        rope_fwd, rope_dx, attention_fwd, attention_dx, add_fwd, dropout_fwd, linearcrossentropy_fwd, narrow, widen,
        halve, accumulate, sumsq, adamw_step, adamw_try, adamw_keep,
    )
}  # fmt: skip
