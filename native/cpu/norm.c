/* norm.c: LayerNorm and RMSNorm over the c channels of each of n tokens.
 *
 *   layernorm: u = (x - mean) rstd, y = u w + b, rstd = 1/sqrt(mean((x - mean)^2) + eps)     g = dy w
 *              dx = rstd (g - mean(g) - u mean(g u)) + z;   dw += sum over n of dy u;   db += sum over n of dy
 *   rmsnorm:   u = x rstd,          y = u w,     rstd = 1/sqrt(mean(x^2) + eps)
 *              dx = rstd (g - u mean(g u)) + z;             dw += sum over n of dy u
 * z is the gradient that comes around the layer, and may be absent. fwd and dx write, dw accumulates. Moves 8 n c bytes
 * (fwd), 12 n c (dx), 8 n c (dw): a row is read from memory once and found in cache by the later loops over it.
 * The trick: u is never stored; dx and dw rebuild it from x and one or two numbers a row. dw is shared by columns.
 */
#include "team.h"

void hp_layernorm_fwd(float *y, float *mean, float *rstd, const float *x, const float *w, const float *b, int64_t n,
    int64_t c, float eps) {
#pragma omp parallel for schedule(static) if (n * c > HP_GRAIN)
  for (int64_t i = 0; i < n; i++) {
    const float *restrict row = x + i * c;
    float *restrict to = y + i * c;
    float sum = 0, squares = 0;
    HP_SUM(sum, c, row[j]);
    const float m = sum / (float)c;
    HP_SUM(squares, c, (row[j] - m) * (row[j] - m));
    const float r = 1.0f / sqrtf(squares / (float)c + eps);
    for (int64_t j = 0; j < c; j++) to[j] = (row[j] - m) * r * w[j] + b[j];
    mean[i] = m;
    rstd[i] = r;
  }
}

void hp_layernorm_dx(float *dx, const float *dy, const float *x, const float *w, const float *mean, const float *rstd,
    const float *z, int64_t n, int64_t c) {
#pragma omp parallel for schedule(static) if (n * c > HP_GRAIN)
  for (int64_t i = 0; i < n; i++) {
    const float *restrict row = x + i * c, *restrict up = dy + i * c, *restrict around = z ? z + i * c : NULL;
    float *restrict to = dx + i * c;
    const float m = mean[i], r = rstd[i];
    float g = 0, gu = 0;
    HP_SUM(g, c, up[j] * w[j]);
    HP_SUM(gu, c, up[j] * w[j] * ((row[j] - m) * r));
    g /= (float)c;
    gu /= (float)c;
    if (z) for (int64_t j = 0; j < c; j++) to[j] = r * (up[j] * w[j] - g - (row[j] - m) * r * gu) + around[j];
    else for (int64_t j = 0; j < c; j++) to[j] = r * (up[j] * w[j] - g - (row[j] - m) * r * gu);
  }
}

void hp_layernorm_dw(float *dw, float *db, const float *dy, const float *x, const float *mean, const float *rstd,
    int64_t n, int64_t c) {
  const int64_t slab = hp_column_slab(c);
#pragma omp parallel for schedule(static) if (n * c > HP_GRAIN)
  for (int64_t j0 = 0; j0 < c; j0 += slab)
    for (int64_t i0 = 0; i0 < n; i0 += HP_ROWS) {
      const int64_t i1 = HP_MIN(n, i0 + HP_ROWS), j1 = HP_MIN(c, j0 + slab);
      HP_COLUMN_SUM(dw, i0, i1, j0, j1, dy[i * c + j] * ((x[i * c + j] - mean[i]) * rstd[i]));
      HP_COLUMN_SUM(db, i0, i1, j0, j1, dy[i * c + j]);
    }
}

void hp_rmsnorm_fwd(float *y, float *rstd, const float *x, const float *w, int64_t n, int64_t c, float eps) {
#pragma omp parallel for schedule(static) if (n * c > HP_GRAIN)
  for (int64_t i = 0; i < n; i++) {
    const float *restrict row = x + i * c;
    float *restrict to = y + i * c;
    float squares = 0;
    HP_SUM(squares, c, row[j] * row[j]);
    const float r = 1.0f / sqrtf(squares / (float)c + eps);
    for (int64_t j = 0; j < c; j++) to[j] = row[j] * r * w[j];
    rstd[i] = r;
  }
}

void hp_rmsnorm_dx(float *dx, const float *dy, const float *x, const float *w, const float *rstd, const float *z,
    int64_t n, int64_t c) {
#pragma omp parallel for schedule(static) if (n * c > HP_GRAIN)
  for (int64_t i = 0; i < n; i++) {
    const float *restrict row = x + i * c, *restrict up = dy + i * c, *restrict around = z ? z + i * c : NULL;
    float *restrict to = dx + i * c;
    const float r = rstd[i];
    float gu = 0;
    HP_SUM(gu, c, up[j] * w[j] * (row[j] * r));
    gu /= (float)c;
    if (z) for (int64_t j = 0; j < c; j++) to[j] = r * (up[j] * w[j] - row[j] * r * gu) + around[j];
    else for (int64_t j = 0; j < c; j++) to[j] = r * (up[j] * w[j] - row[j] * r * gu);
  }
}

void hp_rmsnorm_dw(float *dw, const float *dy, const float *x, const float *rstd, int64_t n, int64_t c) {
  const int64_t slab = hp_column_slab(c);
#pragma omp parallel for schedule(static) if (n * c > HP_GRAIN)
  for (int64_t j0 = 0; j0 < c; j0 += slab)
    for (int64_t i0 = 0; i0 < n; i0 += HP_ROWS)
      HP_COLUMN_SUM(dw, i0, HP_MIN(n, i0 + HP_ROWS), j0, HP_MIN(c, j0 + slab),
          dy[i * c + j] * (x[i * c + j] * rstd[i]));
}
