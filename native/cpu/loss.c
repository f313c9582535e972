/* loss.c: softmax cross-entropy over v classes for n tokens, loss and gradient in one call.
 *
 *   nll[n] = log sum exp(logits) - logits[target];  loss = sum of nll in float64;  logits <- scale (softmax - onehot)
 * Writes loss and nll, overwrites logits[n,v]. A target below 0 is ignored: nll 0, gradient 0. A target of v or more
 * gives NaN. Moves 8 n v bytes: a row of logits is read and written once, its three loops run in cache.
 * The trick: the gradient takes the place of the logits, so the largest activation of a model exists once. The sum over
 * tokens runs in the order of the tokens.
 */
#include "team.h"

static float row(float *restrict x, int64_t target, int64_t v, float scale) {
  if (target < 0) {
    memset(x, 0, (size_t)v * sizeof *x);
    return 0;
  }
  float top = x[0], sum = 0;
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < v; j++) top = x[j] > top ? x[j] : top;
  const float chosen = target < v ? x[target] - top : NAN;
#pragma omp simd
  for (int64_t j = 0; j < v; j++) x[j] = hp_exp(x[j] - top);
  HP_SUM(sum, v, x[j]);
  const float factor = target < v ? scale / sum : NAN;
  for (int64_t j = 0; j < v; j++) x[j] *= factor;
  if (target < v) x[target] -= scale;
  return hp_log(sum) - chosen;
}

void hp_crossentropy_fwd(double *loss, float *nll, float *logits, const int32_t *targets, int64_t n, int64_t v,
    float scale) {
#pragma omp parallel for schedule(static) if (n * v > HP_GRAIN)
  for (int64_t i = 0; i < n; i++) nll[i] = row(logits + i * v, targets[i], v, scale);
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += nll[i];
  *loss = sum;
}
