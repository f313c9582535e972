/* norm.cu: LayerNorm and RMSNorm over the c channels of each of n tokens; the twin of native/cpu/norm.c.
 *
 *   layernorm: u = (x - mean) rstd, y = u w + b, rstd = 1/sqrt(mean((x - mean)^2) + eps)     g = dy w
 *              dx = rstd (g - mean(g) - u mean(g u)) + z;   dw += sum over n of dy u;   db += sum over n of dy
 *   rmsnorm:   u = x rstd,          y = u w,     rstd = 1/sqrt(mean(x^2) + eps)
 *              dx = rstd (g - u mean(g u)) + z;             dw += sum over n of dy u
 * z is the gradient that comes around the layer, and may be absent. fwd and dx write, dw accumulates. Moves, with e
 * bytes an element (4 or 2), 2 e n c (fwd), 3 e n c (dx; 4 e n c with z), 2 e n c (dw).
 * The trick: blockDim.x threads hold a row in registers as it lies in memory, so that the second look at it costs
 * nothing; only what is beyond HELD_ pieces of 16 bytes a thread is read again, from cache. dw goes in two steps:
 * blocks of rows and columns, as many as n says, whatever the device; then the blocks of a column, in a fixed order.
 */
#include "device.cuh"

/* Two rows are held by dx: half as much of each. */
#define HELD_FWD 4
#define HELD_DX 2

/* The part of a row that a thread has: pieces at first, first + step, ... below c. */
struct hp_part {
  int first, step, c; /* c is 0 for threads without a row */
  bool whole;         /* rows are aligned and multiples of a piece long */
};
template <typename A>
HP_FN hp_part part_of_row(int64_t c, bool there) {
  constexpr int W = hp_vector<A>::size;
  return hp_part{(int)threadIdx.x * W, (int)blockDim.x * W, there ? (int)c : 0, c % W == 0};
}
template <typename A>
HP_FN hp_pack<A> piece(const A *row, hp_part part, int j) {
  return part.whole ? hp_take(row + j) : hp_take_some(row + j, part.c - j);
}
template <int HELD, typename A>
HP_FN void hold(const A *row, hp_part part, hp_pack<A> (&held)[HELD]) {
#pragma unroll
  for (int k = 0; k < HELD; k++) {
    const int j = part.first + k * part.step;
    if (j < part.c) held[k] = piece(row, part, j);
  }
}
/* body(j, v) for every piece of a row, v its elements as floats; body(j, v, u) for those of two rows. */
template <int HELD, typename A, typename Body>
HP_FN void each_piece(const A *row, hp_part part, const hp_pack<A> (&held)[HELD], Body body) {
  float v[hp_vector<A>::size];
#pragma unroll
  for (int k = 0; k < HELD; k++) {
    const int j = part.first + k * part.step;
    if (j < part.c) hp_spread(held[k], v), body(j, v);
  }
  for (int j = part.first + HELD * part.step; j < part.c; j += part.step) hp_spread(piece(row, part, j), v), body(j, v);
}
template <int HELD, typename A, typename Body>
HP_FN void each_pair(const A *row, const A *other, hp_part part, const hp_pack<A> (&held)[HELD],
    const hp_pack<A> (&others)[HELD], Body body) {
  float v[hp_vector<A>::size], u[hp_vector<A>::size];
#pragma unroll
  for (int k = 0; k < HELD; k++) {
    const int j = part.first + k * part.step;
    if (j < part.c) hp_spread(held[k], v), hp_spread(others[k], u), body(j, v, u);
  }
  for (int j = part.first + HELD * part.step; j < part.c; j += part.step)
    hp_spread(piece(row, part, j), v), hp_spread(piece(other, part, j), u), body(j, v, u);
}

/* The sum over the threads of one row, a multiple of 32 of them: every one gets it. */
HP_FN float row_sum(float value, float *room) {
  value = hp_warp_sum(value);
  if (blockDim.x == 32) return value;
  const int warps = (int)blockDim.x / 32, own = (int)threadIdx.y * warps;
  if (hp_lane() == 0) room[hp_warp()] = value;
  __syncthreads();
  value = hp_warp_sum(hp_lane() < warps ? room[own + hp_lane()] : 0.0f);
  __syncthreads();
  return value;
}

template <typename A, bool CENTRED>
HP_FN void norm_fwd(A *__restrict__ y, float *__restrict__ mean, float *__restrict__ rstd, const A *__restrict__ x,
    const float *__restrict__ w, const float *__restrict__ b, int64_t n, int64_t c, float eps) {
  constexpr int W = hp_vector<A>::size;
  __shared__ float room[32];
  for (int64_t top = (int64_t)blockIdx.x * blockDim.y; top < n; top += (int64_t)gridDim.x * blockDim.y) {
    const int64_t i = top + threadIdx.y;
    const hp_part part = part_of_row<A>(c, i < n);
    const A *row = x + i * c;
    A *to = y + i * c;
    hp_pack<A> held[HELD_FWD];
    hold(row, part, held);
    float m = 0, squares = 0;
    if (CENTRED) {
      each_piece(row, part, held, [&](int, const float (&v)[W]) {
#pragma unroll
        for (int l = 0; l < W; l++) m += v[l]; /* what is beyond the end is 0 */
      });
      m = row_sum(m, room) / (float)c;
    }
    each_piece(row, part, held, [&](int j, const float (&v)[W]) {
#pragma unroll
      for (int l = 0; l < W; l++)
        if (part.whole || j + l < part.c) squares += (v[l] - m) * (v[l] - m);
    });
    const float r = 1.0f / sqrtf(row_sum(squares, room) / (float)c + eps);
    each_piece(row, part, held, [&](int j, float (&v)[W]) {
      float g[W];
      hp_load_row(w + j, part.whole, part.c - j, g);
#pragma unroll
      for (int l = 0; l < W; l++) v[l] = (v[l] - m) * r * g[l];
      if (CENTRED) {
        hp_load_row(b + j, part.whole, part.c - j, g);
#pragma unroll
        for (int l = 0; l < W; l++) v[l] += g[l];
      }
      hp_store_row(to + j, part.whole, part.c - j, v);
    });
    if (threadIdx.x == 0 && i < n) {
      if (CENTRED) mean[i] = m;
      rstd[i] = r;
    }
  }
}

template <typename A, bool CENTRED>
HP_FN void norm_dx(A *__restrict__ dx, const A *__restrict__ dy, const A *__restrict__ x, const float *__restrict__ w,
    const float *__restrict__ mean, const float *__restrict__ rstd, const A *__restrict__ z, int64_t n, int64_t c) {
  constexpr int W = hp_vector<A>::size;
  __shared__ float room[32];
  for (int64_t top = (int64_t)blockIdx.x * blockDim.y; top < n; top += (int64_t)gridDim.x * blockDim.y) {
    const int64_t i = top + threadIdx.y;
    const hp_part part = part_of_row<A>(c, i < n);
    const A *row = x + i * c, *up = dy + i * c;
    const float m = CENTRED && i < n ? mean[i] : 0.0f, r = i < n ? rstd[i] : 0.0f;
    hp_pack<A> held[HELD_DX], ups[HELD_DX];
    hold(row, part, held);
    hold(up, part, ups);
    float g = 0, gu = 0;
    each_pair(row, up, part, held, ups, [&](int j, const float (&v)[W], const float (&d)[W]) {
      float weight[W];
      hp_load_row(w + j, part.whole, part.c - j, weight);
#pragma unroll
      for (int l = 0; l < W; l++) {
        if (CENTRED) g += d[l] * weight[l];
        gu += d[l] * weight[l] * ((v[l] - m) * r); /* beyond the end d is 0 */
      }
    });
    if (CENTRED) g = row_sum(g, room) / (float)c;
    gu = row_sum(gu, room) / (float)c;
    each_pair(row, up, part, held, ups, [&](int j, float (&v)[W], const float (&d)[W]) {
      float weight[W];
      hp_load_row(w + j, part.whole, part.c - j, weight);
#pragma unroll
      for (int l = 0; l < W; l++) v[l] = r * (d[l] * weight[l] - g - (v[l] - m) * r * gu);
      if (z) {
        hp_load_row(z + i * c + j, part.whole, part.c - j, weight);
#pragma unroll
        for (int l = 0; l < W; l++) v[l] += weight[l];
      }
      hp_store_row(dx + i * c + j, part.whole, part.c - j, v);
    });
  }
}

/* Blocks of (32, WARPS): block (x, y) sums columns [32 W x, 32 W (x + 1)) of rows [rows y, rows (y + 1)) and leaves
 * work[y, kind, c], kind 0 for dw and 1 for db. */
#define WARPS 8
#define FOUR_BLOCKS 256, 4 /* of 256 threads on a multiprocessor */
template <typename A, bool CENTRED>
HP_FN void norm_dw_blocks(const A *__restrict__ dy, const A *__restrict__ x, const float *__restrict__ mean,
    const float *__restrict__ rstd, int64_t n, int64_t c, int64_t rows, float *__restrict__ work) {
  constexpr int W = hp_vector<A>::size, KINDS = CENTRED ? 2 : 1;
  __shared__ float room[WARPS][KINDS][32 * W];
  const int start = (int)blockIdx.x * 32 * W, j = start + (int)threadIdx.x * W, left = (int)c - j;
  const int64_t first = blockIdx.y * rows;
  const int end = (int)hp_smaller(n, first + rows);
  const bool whole = c % W == 0;
  float dw[W] = {}, db[W] = {};
  if (left > 0) {
    int64_t at = (first + threadIdx.y) * c + j;
#pragma unroll 2
    for (int i = (int)(first + threadIdx.y); i < end; i += WARPS, at += WARPS * c) {
      float d[W], v[W];
      hp_load_row(dy + at, whole, left, d);
      hp_load_row(x + at, whole, left, v);
      const float m = CENTRED ? mean[i] : 0.0f, r = rstd[i];
#pragma unroll
      for (int l = 0; l < W; l++) {
        dw[l] += d[l] * ((v[l] - m) * r);
        if (CENTRED) db[l] += d[l];
      }
    }
  }
#pragma unroll
  for (int l = 0; l < W; l++) {
    room[threadIdx.y][0][threadIdx.x * W + l] = dw[l];
    if (CENTRED) room[threadIdx.y][KINDS - 1][threadIdx.x * W + l] = db[l];
  }
  __syncthreads();
  const int column = start + hp_thread();
  if (hp_thread() >= 32 * W || column >= c) return;
#pragma unroll
  for (int kind = 0; kind < KINDS; kind++) {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) sum += room[warp][kind][hp_thread()];
    work[(blockIdx.y * KINDS + kind) * c + column] = sum;
  }
}

/* Blocks of (32, WARPS) over columns and kinds: to += the blocks of a column, by warps and then over the warps. */
HP_FN void norm_dw_total(float *__restrict__ to, int64_t c, int64_t blocks, int kinds, int kind,
    const float *__restrict__ work) {
  __shared__ float room[WARPS][32];
  const int64_t j = (int64_t)blockIdx.x * 32 + threadIdx.x;
  float sum = 0;
  if (j < c) {
#pragma unroll 4
    for (int64_t block = threadIdx.y; block < blocks; block += WARPS) sum += work[(block * kinds + kind) * c + j];
  }
  room[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || j >= c) return;
  for (int warp = 1; warp < WARPS; warp++) sum += room[warp][threadIdx.x];
  to[j] += sum;
}

template <typename A>
HP_FN void layernorm_fwd(A *y, float *mean, float *rstd, const A *x, const float *w, const float *b, int64_t n,
    int64_t c, float eps) {
  norm_fwd<A, true>(y, mean, rstd, x, w, b, n, c, eps);
}
HP_ENTRY(layernorm_fwd, 1024, (A *y, float *mean, float *rstd, const A *x, const float *w, const float *b, int64_t n,
    int64_t c, float eps), (y, mean, rstd, x, w, b, n, c, eps))

template <typename A>
HP_FN void layernorm_dx(A *dx, const A *dy, const A *x, const float *w, const float *mean, const float *rstd,
    const A *z, int64_t n, int64_t c) {
  norm_dx<A, true>(dx, dy, x, w, mean, rstd, z, n, c);
}
HP_ENTRY(layernorm_dx, 1024, (A *dx, const A *dy, const A *x, const float *w, const float *mean, const float *rstd,
    const A *z, int64_t n, int64_t c), (dx, dy, x, w, mean, rstd, z, n, c))

template <typename A>
HP_FN void layernorm_dw_blocks(const A *dy, const A *x, const float *mean, const float *rstd, int64_t n, int64_t c,
    int64_t rows, void *work) {
  norm_dw_blocks<A, true>(dy, x, mean, rstd, n, c, rows, (float *)work);
}
HP_ENTRY(layernorm_dw_blocks, FOUR_BLOCKS, (const A *dy, const A *x, const float *mean, const float *rstd, int64_t n,
    int64_t c, int64_t rows, void *work), (dy, x, mean, rstd, n, c, rows, work))

extern "C" __global__ void __launch_bounds__(256) hp_layernorm_dw_total(float *dw, float *db, int64_t c,
    int64_t blocks, const void *work) {
  norm_dw_total(blockIdx.y == 0 ? dw : db, c, blocks, 2, (int)blockIdx.y, (const float *)work);
}

template <typename A>
HP_FN void rmsnorm_fwd(A *y, float *rstd, const A *x, const float *w, int64_t n, int64_t c, float eps) {
  norm_fwd<A, false>(y, nullptr, rstd, x, w, nullptr, n, c, eps);
}
HP_ENTRY(rmsnorm_fwd, 1024, (A *y, float *rstd, const A *x, const float *w, int64_t n, int64_t c, float eps),
    (y, rstd, x, w, n, c, eps))

template <typename A>
HP_FN void rmsnorm_dx(A *dx, const A *dy, const A *x, const float *w, const float *rstd, const A *z, int64_t n,
    int64_t c) {
  norm_dx<A, false>(dx, dy, x, w, nullptr, rstd, z, n, c);
}
HP_ENTRY(rmsnorm_dx, 1024, (A *dx, const A *dy, const A *x, const float *w, const float *rstd, const A *z, int64_t n,
    int64_t c), (dx, dy, x, w, rstd, z, n, c))

template <typename A>
HP_FN void rmsnorm_dw_blocks(const A *dy, const A *x, const float *rstd, int64_t n, int64_t c, int64_t rows,
    void *work) {
  norm_dw_blocks<A, false>(dy, x, nullptr, rstd, n, c, rows, (float *)work);
}
HP_ENTRY(rmsnorm_dw_blocks, FOUR_BLOCKS, (const A *dy, const A *x, const float *rstd, int64_t n, int64_t c,
    int64_t rows, void *work), (dy, x, rstd, n, c, rows, work))

extern "C" __global__ void __launch_bounds__(256) hp_rmsnorm_dw_total(float *dw, int64_t c, int64_t blocks,
    const void *work) {
  norm_dw_total(dw, c, blocks, 1, 0, (const float *)work);
}
