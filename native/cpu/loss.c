/* loss.c: where a model ends: logits, softmax cross-entropy over v classes, and both gradients, by blocks of r tokens.
 *
 *   logits = x w^T;  nll[n] = log sum exp(logits) - logits[target];  loss = sum of nll in float64
 *   dlogits = scale (softmax - onehot);  dx = dlogits w;  dw += dlogits^T x;  key[3] == 0: the loss alone, dx = 0
 * Writes loss, nll and dx[n,c], accumulates into dw[v,c]. A target below 0 is ignored: nll 0, gradient 0. A target of v
 * or more gives NaN. Moves 4 (2 n c + 2 v c) bytes and, for each block, w twice and dw in and out.
 * The trick: nobody needs the logits of all tokens at once. A block of them, logits[r,v], is made, turned into its
 * gradient where it lies, multiplied twice and forgotten. The sum over tokens runs in the order of the tokens.
 */
#include "product.h"

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

void hp_linearcrossentropy_fwd(double *loss, float *nll, float *dx, float *logits, float *dw, const float *x,
    const float *w, const int32_t *targets, const int64_t *key, int64_t n, int64_t v, int64_t c, int64_t r, float scale,
    void *work) {
  const hp_matrix weight = {w, c, 0}, across = {w, c, 1};
  if (!key[3]) memset(dx, 0, (size_t)(n * c) * sizeof *dx);
  double sum = 0;
  for (int64_t first = 0; first < n; first += r) {
    const int64_t rows = HP_MIN(r, n - first);
    const hp_matrix tokens = {x + first * c, c, 0};
    hp_product(logits, v, tokens, across, rows, v, c, NULL, NULL, work);
#pragma omp parallel for schedule(static) if (rows * v > HP_GRAIN)
    for (int64_t i = 0; i < rows; i++) nll[first + i] = row(logits + i * v, targets[first + i], v, scale);
    for (int64_t i = first; i < first + rows; i++) sum += nll[i];
    if (!key[3]) continue;
    hp_product(dx + first * c, c, (hp_matrix){logits, v, 0}, weight, rows, c, v, NULL, NULL, work);
    hp_product(dw, c, (hp_matrix){logits, v, 1}, tokens, v, c, rows, dw, NULL, work);
  }
  *loss = sum;
}
