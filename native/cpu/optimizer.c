/* optimizer.c: what happens to n parameters or gradients at the end of a step.
 *
 *   accumulate: acc += x                                                                        12 n bytes
 *   sumsq:      s = sum of x^2 in float64                                                         4 n bytes
 *   adamw_step: g' = scale g;  m = b1 m + (1-b1) g';  v = b2 v + (1-b2) g'^2;
 *               p -= lr (m / (1-b1^step) / (sqrt(v / (1-b2^step)) + eps) + decay p);  g = 0      32 n bytes
 *   adamw_try:  old = p, and p as in adamw_step; m, v and g stay                                 24 n bytes
 *   Where half is there it gets the new p as bfloat16, 2 n bytes more; halve: the same without a step, 6 n bytes.
 *   adamw_keep: m and v as in adamw_step, g = 0: with adamw_try before it the same to the bit    24 n bytes
 * accumulate adds, sumsq writes, the others update in place.
 * The trick: sumsq adds blocks whose number and size depend on n alone, and then the blocks in order.
 */
#include "team.h"

#define HP_BLOCKS 256

void hp_accumulate(float *acc, const float *x, int64_t n) {
  HP_EACH_ELEMENT(n, acc[e] += x[e];);
}

void hp_sumsq(double *s, const float *x, int64_t n) {
  double sums[HP_BLOCKS], total = 0;
  const int64_t size = HP_MAX(HP_PIECE, ((n + HP_BLOCKS - 1) / HP_BLOCKS + 63) / 64 * 64);
  const int64_t blocks = (n + size - 1) / size;
#pragma omp parallel for schedule(static) if (n > HP_GRAIN)
  for (int64_t i = 0; i < blocks; i++) {
    const int64_t end = HP_MIN(n, (i + 1) * size);
    double lanes[HP_LANES] = {0}, sum = 0;
    int64_t e = i * size;
    for (; e + HP_LANES <= end; e += HP_LANES)
      for (int64_t l = 0; l < HP_LANES; l++) lanes[l] += (double)x[e + l] * (double)x[e + l];
    for (; e < end; e++) sum += (double)x[e] * (double)x[e];
    for (int64_t l = 0; l < HP_LANES; l++) sum += lanes[l];
    sums[i] = sum;
  }
  for (int64_t i = 0; i < blocks; i++) total += sums[i];
  *s = total;
}

static hp_adamw settings(const double *hyper, float decay) {
  return (hp_adamw){(float)hyper[0], (float)hyper[1], (float)hyper[2], (float)(1.0 - hyper[1]),
      (float)(1.0 - hyper[2]), (float)hyper[3], (float)(1.0 / hyper[4]), (float)(1.0 / hyper[5]), (float)hyper[6],
      decay};
}

void hp_halve(uint16_t *y, const float *x, int64_t n) {
  HP_EACH_ELEMENT(n, y[e] = hp_bfloat16_of(x[e]););
}

void hp_adamw_step(float *p, float *g, float *m, float *v, uint16_t *half, const double *hyper, int64_t n,
    float decay) {
  const hp_adamw a = settings(hyper, decay);
  HP_EACH_ELEMENT(n, {
    float m1, v1;
    hp_adamw_moments(&a, g[e], m[e], v[e], &m1, &v1);
    p[e] = hp_adamw_value(&a, p[e], m1, v1);
    m[e] = m1;
    v[e] = v1;
    g[e] = 0.0f;
  });
  if (half) hp_halve(half, p, n);
}

void hp_adamw_try(float *old, float *p, const float *g, const float *m, const float *v, uint16_t *half,
    const double *hyper, int64_t n, float decay) {
  const hp_adamw a = settings(hyper, decay);
  HP_EACH_ELEMENT(n, {
    float m1, v1;
    hp_adamw_moments(&a, g[e], m[e], v[e], &m1, &v1);
    old[e] = p[e];
    p[e] = hp_adamw_value(&a, p[e], m1, v1);
  });
  if (half) hp_halve(half, p, n);
}

void hp_adamw_keep(float *g, float *m, float *v, const double *hyper, int64_t n) {
  const hp_adamw a = settings(hyper, 0);
  HP_EACH_ELEMENT(n, {
    float m1, v1;
    hp_adamw_moments(&a, g[e], m[e], v[e], &m1, &v1);
    m[e] = m1;
    v[e] = v1;
    g[e] = 0.0f;
  });
}
