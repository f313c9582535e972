/* linear.c: the three passes of y = x w^T + b.
 *
 * n tokens, c channels in, o channels out.   x[n,c]  w[o,c]  b[o]  y[n,o]
 *   fwd: y  = x w^T + b          writes y
 *   dx:  dx = dy w               writes dx
 *   dw:  dw += dy^T x, db += sum over n of dy     accumulates into dw, db
 * Moves each operand once (4 (n c + o c + n o) bytes, dw twice) as long as a tile's operands fit a core's cache.
 * The trick: the output is cut into tiles by its shape alone, never by the number of threads, and each tile is one
 * single-threaded BLAS call: a tile's bits do not depend on who computes it. The bias is written first and the product
 * added to it, which saves BLAS its own pass that would clear y.
 */
#include "team.h"

/* A tile of m x k outputs over a depth of K costs K (m k + HP_PACK (m + k)) + HP_CALL multiply-adds: BLAS first copies
 * its operands into the order it wants. A side of at most HP_TILE keeps them in a core's second-level cache; waking a
 * team costs HP_WAKE. All four measured. */
#define HP_TILE 512
#define HP_PACK 25
#define HP_CALL 65536
#define HP_WAKE 262144

typedef struct { int64_t rows, cols, down, across; } tiling;

static tiling cut(int64_t rows, int64_t cols, int64_t down, int64_t across) {
  tiling t = {((rows + down - 1) / down + 15) / 16 * 16, ((cols + across - 1) / across + 15) / 16 * 16, 0, 0};
  t.down = (rows + t.rows - 1) / t.rows;
  t.across = (cols + t.cols - 1) / t.cols;
  return t;
}

/* What a product costs teams of 1, 2 and 4 in all: they share small ones evenly, large ones have tiles for any team. */
static double cost(tiling t, int64_t depth) {
  const int64_t count = t.down * t.across;
  const double tile = (double)depth * (double)(t.rows * t.cols + HP_PACK * (t.rows + t.cols)) + HP_CALL;
  return (double)(count + 2 * ((count + 1) / 2) + 4 * ((count + 3) / 4)) * tile + (count > 1 ? HP_WAKE : 0);
}

static tiling tiles(int64_t rows, int64_t cols, int64_t depth) {
  static const int64_t finer[] = {1, 2, 3, 4, 6, 8};
  const int64_t down = (rows + HP_TILE - 1) / HP_TILE, across = (cols + HP_TILE - 1) / HP_TILE;
  tiling best = cut(rows, cols, down, across);
  double least = cost(best, depth);
  for (int i = 0; i < 6 && (i == 0 || rows / (down * finer[i]) >= 48); i++)
    for (int j = 0; j < 6 && (j == 0 || cols / (across * finer[j]) >= 48); j++) {
      const tiling t = cut(rows, cols, down * finer[i], across * finer[j]);
      const double c = cost(t, depth);
      if (c < least) best = t, least = c;
    }
  return best;
}

/* One loop for the three passes; the body sees a tile's origin (i, j) and size (m, k). */
#define HP_EACH_TILE(rows_, cols_, depth_, body)                                      \
  do {                                                                                \
    const tiling t_ = tiles(rows_, cols_, depth_);                                    \
    const int64_t count_ = t_.down * t_.across;                                       \
    _Pragma("omp parallel for schedule(dynamic, 1) if (count_ > 1)")                  \
    for (int64_t tile_ = 0; tile_ < count_; tile_++) {                                \
      const int64_t i = tile_ / t_.across * t_.rows, j = tile_ % t_.across * t_.cols; \
      const int64_t m = HP_MIN(t_.rows, (rows_) - i), k = HP_MIN(t_.cols, (cols_) - j); \
      body                                                                            \
    }                                                                                 \
  } while (0)

void hp_linear_fwd(float *y, const float *x, const float *w, const float *b, int64_t n, int64_t o, int64_t c) {
  HP_EACH_TILE(n, o, c, {
    if (b)
      for (int64_t r = i; r < i + m; r++) memcpy(y + r * o + j, b + j, (size_t)k * sizeof *y);
    hp_sgemm(CblasNoTrans, CblasTrans, m, k, c, 1, x + i * c, c, w + j * c, c, b ? 1 : 0, y + i * o + j, o);
  });
}

void hp_linear_dx(float *dx, const float *dy, const float *w, int64_t n, int64_t o, int64_t c) {
  HP_EACH_TILE(n, c, o, {
    hp_sgemm(CblasNoTrans, CblasNoTrans, m, k, o, 1, dy + i * o, o, w + j, c, 0, dx + i * c + j, c);
  });
}

void hp_linear_dw(float *dw, float *db, const float *dy, const float *x, int64_t n, int64_t o, int64_t c) {
  HP_EACH_TILE(o, c, n, {
    hp_sgemm(CblasTrans, CblasNoTrans, m, k, n, 1, dy + i, o, x + j, c, 1, dw + i * c + j, c);
  });
  if (!db) return;
  const int64_t slab = hp_column_slab(o);
#pragma omp parallel for schedule(static) if (n * o > HP_GRAIN)
  for (int64_t j0 = 0; j0 < o; j0 += slab)
    for (int64_t i0 = 0; i0 < n; i0 += HP_ROWS)
      HP_COLUMN_SUM(db, i0, HP_MIN(n, i0 + HP_ROWS), j0, HP_MIN(o, j0 + slab), dy[i * o + j]);
}
