/* loss.cu: the middle of linearcrossentropy: logits to losses and, where they lie, to their gradient.
 *
 * Of n tokens with v classes, as many as the grid has blocks have their logits, from token i0 on, in logits[blocks,v]:
 *   nll = log sum exp(logits) - logits[target];   dlogits = scale (softmax - onehot), 0 where key[3] == 0
 *   then, over all n:  loss = sum of nll in float64
 * Writes nll and logits; loss. A target below 0 is ignored: nll 0, gradient 0. A target of v or more gives NaN. Moves
 * 3 e v bytes a token, with e bytes an element (4 or 2). The products before and behind it are not here.
 * The trick: one look finds the largest logit and the sum of exponentials together, by rescaling the sum whenever the
 * largest grows (Milakov, Gimelshein 2018). v is often odd: the second look takes single elements up to the first
 * 16-byte line, then lines.
 */
#include "device.cuh"

/* body(x) for the W numbers of a row at a time that this thread adds up, minus infinity for those beyond its end. Which
 * they are depends on v alone, not on where the row lies: the loss is the same in blocks of any size. */
template <typename A, typename Body>
HP_FN void read_row(const A *row, int64_t v, Body body) {
  constexpr int W = hp_vector<A>::size;
  float x[W];
  if (v % W == 0) {
#pragma unroll 2
    for (int64_t j = threadIdx.x * W; j < v; j += blockDim.x * W) hp_load(row + j, x), body(x);
  } else {
    for (int64_t j = threadIdx.x; j < v; j += blockDim.x * W) {
#pragma unroll
      for (int i = 0; i < W; i++) x[i] = j + i * blockDim.x < v ? hp_get(row[j + i * blockDim.x]) : -INFINITY;
      body(x);
    }
  }
}

/* body(j, count) for the parts of a row that this thread changes; count is W at addresses of 16 bytes, 1 before and
 * behind those. */
template <typename A, typename Body>
HP_FN void over_row(const A *row, int64_t v, Body body) {
  constexpr int W = hp_vector<A>::size;
  const int64_t lead = hp_smaller(v, (int64_t)((16 - ((hp_address)row & 15)) & 15) / (int64_t)sizeof(A));
  const int64_t lines = (v - lead) / W, tail = lead + lines * W;
  if (threadIdx.x < lead) body((int64_t)threadIdx.x, (int64_t)1);
#pragma unroll 2
  for (int64_t line = threadIdx.x; line < lines; line += blockDim.x) body(lead + line * W, (int64_t)W);
  if (tail + threadIdx.x < v) body(tail + threadIdx.x, (int64_t)1);
}

/* The largest number so far and the sum of exp(x - largest): two of them become one. */
#define LOWEST (-3.402823466e+38f) /* finite: minus infinity less itself is no number */
typedef struct { float top, sum; } hp_tally;
HP_FN hp_tally together(hp_tally a, hp_tally b) {
  const float top = a.top > b.top ? a.top : b.top;
  return hp_tally{top, a.sum * hp_exp(a.top - top) + b.sum * hp_exp(b.top - top)};
}
/* Lane 0 gets the whole warp's. */
HP_FN hp_tally warp_tally(hp_tally own) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) {
    const float top = __shfl_xor_sync(0xffffffffu, own.top, step);
    own = together(own, hp_tally{top, __shfl_xor_sync(0xffffffffu, own.sum, step)});
  }
  return own;
}

/* A block for each token, of 32 to 1024 threads. */
template <typename A>
HP_FN void linearcrossentropy_rows(float *__restrict__ nll, A *logits, const int32_t *__restrict__ targets,
    const int64_t *__restrict__ key, int64_t i0, int64_t v, float scale) {
  constexpr int W = hp_vector<A>::size;
  __shared__ float tops[32], sums[32];
  const int64_t token = i0 + blockIdx.x, target = targets[token];
  A *const row = logits + blockIdx.x * v;
  const bool counted = target >= 0, known = target < v;
  const float chosen = counted && known ? hp_get(row[target]) : hp_nan();

  hp_tally own = {LOWEST, 0.0f};
  read_row(row, v, [&](const float (&x)[W]) {
    float top = own.top;
#pragma unroll
    for (int i = 0; i < W; i++) top = x[i] > top ? x[i] : top;
    float sum = own.sum * hp_exp(own.top - top);
#pragma unroll
    for (int i = 0; i < W; i++) sum += hp_exp(x[i] - top);
    own = hp_tally{top, sum};
  });
  own = warp_tally(own);
  if (hp_lane() == 0) tops[hp_warp()] = own.top, sums[hp_warp()] = own.sum;
  __syncthreads();
  if (hp_warp() == 0) {
    const bool there = hp_lane() < hp_threads() / 32;
    own = warp_tally(hp_tally{there ? tops[hp_lane()] : LOWEST, there ? sums[hp_lane()] : 0.0f});
    __syncwarp();
    if (hp_lane() == 0) tops[0] = own.top, sums[0] = own.sum;
  }
  __syncthreads();

  const float top = tops[0], sum = sums[0];
  if (threadIdx.x == 0) nll[token] = !counted ? 0.0f : hp_log(sum) - (chosen - top);
  const float factor = known ? scale / sum : hp_nan();
  const bool silent = !counted || key[3] == 0;
  over_row(row, v, [&](int64_t j, int64_t count) {
    float x[W] = {};
    if (!silent) {
      if (count == W) hp_load(row + j, x);
      else hp_load_some(row + j, count, x);
#pragma unroll
      for (int i = 0; i < W; i++) x[i] = hp_exp(x[i] - top) * factor - (j + i == target ? scale : 0.0f);
    }
    if (count == W) hp_store(row + j, x);
    else hp_store_some(row + j, count, x);
  });
}
HP_ENTRY(linearcrossentropy_rows, 1024, (float *nll, A *logits, const int32_t *targets, const int64_t *key, int64_t i0,
    int64_t v, float scale), (nll, logits, targets, key, i0, v, scale))

/* One block. */
extern "C" __global__ void __launch_bounds__(256) hp_linearcrossentropy_total(double *loss,
    const float *__restrict__ nll, int64_t n) {
  __shared__ double room[32];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum += (double)nll[i];
  sum = hp_block_sum(sum, room);
  if (threadIdx.x == 0) *loss = sum;
}
