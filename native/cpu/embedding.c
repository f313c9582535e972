/* embedding.c: token rows and learned positions.
 *
 * n tokens (sequences of t), c channels, v vocabulary, s learned positions.   ids[n]  w[v,c]  y[n,c]
 *   embedding_fwd: y = w[ids]                  writes y;   a token outside the vocabulary gives a row of NaN
 *   embedding_dw:  dw[ids] += dy               accumulates
 *   position_fwd:  y = x + w[row % t]          writes y
 *   position_dw:   dw[row % t] += dy           accumulates
 * Moves 8 n c bytes (fwd), 12 n c (dw: the rows that occur, read and written, and dy).
 * The trick: embedding_dw gives each thread columns, not rows, so that a token that occurs twice is added in the order
 * of the tokens without locks; position_dw gives each thread positions, each of which sums over the sequences in order.
 */
#include "team.h"

void hp_embedding_fwd(float *y, const int32_t *ids, const float *w, int64_t n, int64_t v, int64_t c) {
#pragma omp parallel for schedule(static) if (n * c > HP_GRAIN)
  for (int64_t i = 0; i < n; i++) {
    if (ids[i] >= 0 && ids[i] < v) {
      memcpy(y + i * c, w + ids[i] * c, (size_t)c * sizeof *y);
    } else {
      for (int64_t j = 0; j < c; j++) y[i * c + j] = NAN;
    }
  }
}

void hp_embedding_dw(float *dw, const float *dy, const int32_t *ids, int64_t n, int64_t v, int64_t c) {
  const int64_t slab = hp_column_slab(c);
#pragma omp parallel for schedule(static) if (n * c > HP_GRAIN)
  for (int64_t j0 = 0; j0 < c; j0 += slab) {
    const int64_t width = HP_MIN(slab, c - j0);
    for (int64_t i = 0; i < n; i++) {
      if (ids[i] < 0 || ids[i] >= v) continue;
      float *restrict to = dw + ids[i] * c + j0;
      const float *restrict from = dy + i * c + j0;
      for (int64_t j = 0; j < width; j++) to[j] += from[j];
    }
  }
}

void hp_position_fwd(float *y, const float *x, const float *w, int64_t n, int64_t s, int64_t c, int64_t t) {
  (void)s;
#pragma omp parallel for schedule(static) if (n * c > HP_GRAIN)
  for (int64_t i = 0; i < n; i++) {
    const float *restrict from = x + i * c, *restrict at = w + i % t * c;
    float *restrict to = y + i * c;
    for (int64_t j = 0; j < c; j++) to[j] = from[j] + at[j];
  }
}

void hp_position_dw(float *dw, const float *dy, int64_t n, int64_t s, int64_t c, int64_t t) {
  (void)s;
#pragma omp parallel for schedule(static) if (n * c > HP_GRAIN)
  for (int64_t p = 0; p < HP_MIN(t, n); p++)
    for (int64_t i = p; i < n; i += t) {
      float *restrict to = dw + p * c;
      const float *restrict from = dy + i * c;
      for (int64_t j = 0; j < c; j++) to[j] += from[j];
    }
}
