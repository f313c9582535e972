/* activation.c: what happens to each element alone.
 *
 * n tokens, c channels, f feed-forward width.
 *   gelu:    y = x sigmoid(2a (x + b x^3)), the tanh form;           dx = dy times its slope, y again
 *   swiglu:  x = [gate | up]:  y = gate s up, s = sigmoid(gate);   dgate = dy up s (1 + gate (1 - s)), dup = dy gate s,
 *            y again
 *   add:     y = a + b
 *   narrow:  y = the upper 16 bits of x, rounded, and x what they mean;      widen: y = what 16 bits mean
 *   dropout: y = x keep / (1 - p), keep from a counter-based hash;   on == 0 copies
 * All write. Moves 8 n c bytes (gelu_fwd, dropout), 12 n c (add), 16 n c (gelu_dx), 10 n c (narrow), 6 n c
 * (widen), 12 n f (swiglu_fwd), 24 n f (swiglu_dx).
 * The trick: exp is a polynomial in plain arithmetic (formula.h), so the compiler turns these loops into vector code
 * and memory is the limit. swiglu jumps between gate and up, which loses the processor's own prefetching: it asks for
 * the next token's lines itself.
 */
#include "team.h"

#define HP_AHEAD 64
static inline void fetch(const float *p) {
  for (int l = 0; l < HP_AHEAD; l += 16) __builtin_prefetch(p + l);
}

void hp_gelu_fwd(float *y, const float *x, int64_t n, int64_t c) {
  HP_EACH_ELEMENT(n * c, y[e] = hp_gelu(x[e]););
}

void hp_gelu_dx(float *dx, float *y, const float *dy, const float *x, int64_t n, int64_t c) {
  HP_EACH_ELEMENT(n * c, dx[e] = dy[e] * hp_gelu_slope(x[e]); y[e] = hp_gelu(x[e]););
}

void hp_swiglu_fwd(float *y, const float *x, int64_t n, int64_t f) {
#pragma omp parallel for schedule(static) if (n * f > HP_GRAIN)
  for (int64_t i = 0; i < n; i++) {
    const float *restrict gate = x + i * 2 * f, *restrict up = gate + f;
    float *restrict to = y + i * f;
    for (int64_t j0 = 0; j0 < f; j0 += HP_AHEAD) {
      fetch(gate + 2 * f + j0), fetch(up + 2 * f + j0), fetch(to + f + j0);
      for (int64_t j = j0; j < HP_MIN(f, j0 + HP_AHEAD); j++) to[j] = gate[j] * hp_sigmoid(gate[j]) * up[j];
    }
  }
}

void hp_swiglu_dx(float *dx, float *y, const float *dy, const float *x, int64_t n, int64_t f) {
#pragma omp parallel for schedule(static) if (n * f > HP_GRAIN)
  for (int64_t i = 0; i < n; i++) {
    const float *restrict gate = x + i * 2 * f, *restrict up = gate + f, *restrict from = dy + i * f;
    float *restrict dgate = dx + i * 2 * f, *restrict dup = dgate + f, *restrict to = y + i * f;
    for (int64_t j0 = 0; j0 < f; j0 += HP_AHEAD) {
      fetch(gate + 2 * f + j0), fetch(up + 2 * f + j0), fetch(from + f + j0);
      fetch(dgate + 2 * f + j0), fetch(dup + 2 * f + j0), fetch(to + f + j0);
      const int64_t j1 = HP_MIN(f, j0 + HP_AHEAD);
#pragma omp simd
      for (int64_t j = j0; j < j1; j++) {
        const float s = hp_sigmoid(gate[j]), silu = gate[j] * s;
        dgate[j] = from[j] * up[j] * hp_silu_slope(gate[j], s);
        dup[j] = from[j] * silu;
        to[j] = silu * up[j];
      }
    }
  }
}

void hp_add_fwd(float *y, const float *a, const float *b, int64_t n, int64_t c) {
  HP_EACH_ELEMENT(n * c, y[e] = a[e] + b[e];);
}

void hp_narrow(uint16_t *y, float *x, int64_t n, int64_t c) {
  HP_EACH_ELEMENT(n * c, y[e] = hp_bfloat16_of(x[e]); x[e] = hp_float_of_bfloat16(y[e]););
}

void hp_widen(float *y, const uint16_t *x, int64_t n, int64_t c) {
  HP_EACH_ELEMENT(n * c, y[e] = hp_float_of_bfloat16(x[e]););
}

void hp_dropout_fwd(float *y, const float *x, const int64_t *key, int64_t n, int64_t c, int64_t salt, float p) {
  const int64_t on = key[3];
  const uint64_t state = hp_dropout_state(key, salt);
  const uint32_t line = (uint32_t)((double)p * 4294967296.0);
  const float scale = 1.0f / (1.0f - p);
  HP_EACH_ELEMENT(n * c, {
    const float kept = hp_dropout_bits(state, e) >= line ? x[e] * scale : 0.0f;
    y[e] = on ? kept : x[e];
  });
}
