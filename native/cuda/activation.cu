/* activation.cu: what happens to each element alone; the twin of native/cpu/activation.c.
 *
 * n tokens, c channels, f feed-forward width.
 *   gelu:    y = x sigmoid(2a (x + b x^3)), the tanh form;           dx = dy times its slope, y again
 *   swiglu:  x = [gate | up]:  y = gate s up, s = sigmoid(gate);   dgate = dy up s (1 + gate (1 - s)), dup = dy gate s,
 *            y again
 *   add:     y = a + b
 *   narrow:  y = the upper 16 bits of x, rounded, and x what they mean;      widen: y = what 16 bits mean
 *   halve:   y = the upper 16 bits of x, rounded
 *   dropout: y = x keep / (1 - p), keep from a counter-based hash;   on == 0 copies
 * All write. Moves, with e bytes an element (4 or 2): 2 e n c (gelu_fwd, dropout), 3 e n c (add), 4 e n c (gelu_dx),
 * 3 e n f (swiglu_fwd), 6 e n f (swiglu_dx); 10 n c (narrow), 6 n c (widen), 6 n (halve).
 * The trick: a thread moves 16 bytes at a time, two such pieces on the way at once, and neighbours touch neighbours.
 */
#include "device.cuh"

template <typename A>
HP_FN void gelu_fwd(A *__restrict__ y, const A *__restrict__ x, int64_t n, int64_t c) {
  constexpr int W = hp_vector<A>::size;
  hp_each_vector<W>(n * c, [&](int64_t e, int64_t count) {
    float v[W];
    hp_load_upto(x + e, count, v);
#pragma unroll
    for (int i = 0; i < W; i++) v[i] = hp_gelu(v[i]);
    hp_store_upto(y + e, count, v);
  });
}
HP_ENTRY(gelu_fwd, 256, (A *y, const A *x, int64_t n, int64_t c), (y, x, n, c))

template <typename A>
HP_FN void gelu_dx(A *__restrict__ dx, A *__restrict__ y, const A *__restrict__ dy, const A *__restrict__ x, int64_t n,
    int64_t c) {
  constexpr int W = hp_vector<A>::size;
  hp_each_vector<W>(n * c, [&](int64_t e, int64_t count) {
    float v[W], up[W];
    hp_load_upto(x + e, count, v);
    hp_load_upto(dy + e, count, up);
#pragma unroll
    for (int i = 0; i < W; i++) {
      up[i] *= hp_gelu_slope(v[i]);
      v[i] = hp_gelu(v[i]);
    }
    hp_store_upto(dx + e, count, up);
    hp_store_upto(y + e, count, v);
  });
}
HP_ENTRY(gelu_dx, 256, (A *dx, A *y, const A *dy, const A *x, int64_t n, int64_t c), (dx, y, dy, x, n, c))

/* Blocks of (threads along a row, rows). */
template <typename A>
HP_FN void swiglu_fwd(A *__restrict__ y, const A *__restrict__ x, int64_t n, int64_t f) {
  constexpr int W = hp_vector<A>::size;
  const bool whole = f % W == 0;
  for (int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y; row < n; row += (int64_t)gridDim.x * blockDim.y) {
    const A *__restrict__ from = x + row * 2 * f;
#pragma unroll 2
    for (int64_t j = threadIdx.x * W; j < f; j += blockDim.x * W) {
      float gate[W], up[W];
      hp_load_row(from + j, whole, f - j, gate);
      hp_load_row(from + f + j, whole, f - j, up);
#pragma unroll
      for (int i = 0; i < W; i++) gate[i] = gate[i] * hp_sigmoid(gate[i]) * up[i];
      hp_store_row(y + row * f + j, whole, f - j, gate);
    }
  }
}
HP_ENTRY(swiglu_fwd, 256, (A *y, const A *x, int64_t n, int64_t f), (y, x, n, f))

template <typename A>
HP_FN void swiglu_dx(A *__restrict__ dx, A *__restrict__ y, const A *__restrict__ dy, const A *__restrict__ x,
    int64_t n, int64_t f) {
  constexpr int W = hp_vector<A>::size;
  const bool whole = f % W == 0;
  for (int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y; row < n; row += (int64_t)gridDim.x * blockDim.y) {
    const A *__restrict__ from = x + row * 2 * f;
    A *__restrict__ to = dx + row * 2 * f;
    for (int64_t j = threadIdx.x * W; j < f; j += blockDim.x * W) {
      float gate[W], up[W], d[W];
      hp_load_row(from + j, whole, f - j, gate);
      hp_load_row(from + f + j, whole, f - j, up);
      hp_load_row(dy + row * f + j, whole, f - j, d);
#pragma unroll
      for (int i = 0; i < W; i++) {
        const float s = hp_sigmoid(gate[i]), silu = gate[i] * s;
        gate[i] = d[i] * up[i] * hp_silu_slope(gate[i], s);
        d[i] *= silu;
        up[i] *= silu;
      }
      hp_store_row(to + j, whole, f - j, gate);
      hp_store_row(to + f + j, whole, f - j, d);
      hp_store_row(y + row * f + j, whole, f - j, up);
    }
  }
}
HP_ENTRY(swiglu_dx, 256, (A *dx, A *y, const A *dy, const A *x, int64_t n, int64_t f), (dx, y, dy, x, n, f))

template <typename A>
HP_FN void add_fwd(A *__restrict__ y, const A *__restrict__ a, const A *__restrict__ b, int64_t n, int64_t c) {
  constexpr int W = hp_vector<A>::size;
  hp_each_vector<W>(n * c, [&](int64_t e, int64_t count) {
    float u[W], v[W];
    hp_load_upto(a + e, count, u);
    hp_load_upto(b + e, count, v);
#pragma unroll
    for (int i = 0; i < W; i++) u[i] += v[i];
    hp_store_upto(y + e, count, u);
  });
}
HP_ENTRY(add_fwd, 256, (A *y, const A *a, const A *b, int64_t n, int64_t c), (y, a, b, n, c))

template <typename A>
HP_FN void dropout_fwd(A *__restrict__ y, const A *__restrict__ x, const int64_t *__restrict__ key, int64_t n,
    int64_t c, int64_t salt, float p) {
  constexpr int W = hp_vector<A>::size;
  const bool on = key[3] != 0;
  const uint64_t state = hp_dropout_state(key, salt);
  const uint32_t line = (uint32_t)(p * 4294967296.0f); /* a float times a power of two is exact */
  const float scale = 1.0f / (1.0f - p);
  hp_each_vector<W>(n * c, [&](int64_t e, int64_t count) {
    float v[W];
    hp_load_upto(x + e, count, v);
    if (on) {
#pragma unroll
      for (int i = 0; i < W; i++) v[i] = hp_dropout_bits(state, e + i) >= line ? v[i] * scale : 0.0f;
    }
    hp_store_upto(y + e, count, v);
  });
}
HP_ENTRY(dropout_fwd, 256, (A *y, const A *x, const int64_t *key, int64_t n, int64_t c, int64_t salt, float p),
    (y, x, key, n, c, salt, p))

/* Bits by formula.h and not by the conversion instruction, whose NaN is another one. */
HP_FN void bits_of(const float (&v)[8], int64_t count, uint16_t *y) {
  if (count >= 8) {
    uint32_t pair[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
      pair[i] = (uint32_t)hp_bfloat16_of(v[2 * i]) | (uint32_t)hp_bfloat16_of(v[2 * i + 1]) << 16;
    *reinterpret_cast<uint4 *>(y) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (i < count) y[i] = hp_bfloat16_of(v[i]);
  }
}

extern "C" __global__ void __launch_bounds__(256) hp_narrow(uint16_t *__restrict__ y, float *__restrict__ x, int64_t n,
    int64_t c) {
  hp_each_vector<8>(n * c, [&](int64_t e, int64_t count) {
    float v[8];
    hp_load_upto(x + e, count, v);
    bits_of(v, count, y + e);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = hp_float_of_bfloat16(hp_bfloat16_of(v[i]));
    hp_store_upto(x + e, count, v);
  });
}

extern "C" __global__ void __launch_bounds__(256) hp_widen(float *__restrict__ y, const uint16_t *__restrict__ x,
    int64_t n, int64_t c) {
  hp_each_vector<8>(n * c, [&](int64_t e, int64_t count) {
    float v[8];
    hp_load_upto(x + e, count, v);
    hp_store_upto(y + e, count, v);
  });
}

extern "C" __global__ void __launch_bounds__(256) hp_halve(uint16_t *__restrict__ y, const float *__restrict__ x,
    int64_t n) {
  hp_each_vector<8>(n, [&](int64_t e, int64_t count) {
    float v[8];
    hp_load_upto(x + e, count, v);
    bits_of(v, count, y + e);
  });
}
