/* linear.c: the three passes of y = x w^T + b + z.
 *
 * n tokens, c channels in, o channels out.   x[n,c]  w[o,c]  b[o]  y, z[n,o]
 *   fwd: y  = x w^T + b + z      writes y; b, and z, what comes around the layer, may be absent
 *   dx:  dx = dy w               writes dx
 *   dw:  dw += dy^T x, db += sum over n of dy     accumulates into dw, db
 * Moves each operand once (4 (n c + o c + n o) bytes, dw twice) and its panels; the output once more for every
 * HP_DEEP of depth after the first.
 * The trick: see product.h. Bias and z are what a sum starts from.
 */
#include "product.h"

void hp_linear_fwd(float *y, const float *x, const float *w, const float *b, const float *z, int64_t n, int64_t o,
    int64_t c, void *work) {
  hp_product(y, o, (hp_matrix){x, c, 0}, (hp_matrix){w, c, 1}, n, o, c, z, b, work);
}

void hp_linear_dx(float *dx, const float *dy, const float *w, int64_t n, int64_t o, int64_t c, void *work) {
  hp_product(dx, c, (hp_matrix){dy, o, 0}, (hp_matrix){w, c, 0}, n, c, o, NULL, NULL, work);
}

void hp_linear_dw(float *dw, float *db, const float *dy, const float *x, int64_t n, int64_t o, int64_t c, void *work) {
  hp_product(dw, c, (hp_matrix){dy, o, 1}, (hp_matrix){x, c, 0}, o, c, n, dw, NULL, work);
  if (!db) return;
  const int64_t slab = hp_column_slab(o);
#pragma omp parallel for schedule(static) if (n * o > HP_GRAIN)
  for (int64_t j0 = 0; j0 < o; j0 += slab)
    for (int64_t i0 = 0; i0 < n; i0 += HP_ROWS)
      HP_COLUMN_SUM(db, i0, HP_MIN(n, i0 + HP_ROWS), j0, HP_MIN(o, j0 + slab), dy[i * o + j]);
}
