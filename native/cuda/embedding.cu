/* embedding.cu: token rows and learned positions; the twin of native/cpu/embedding.c.
 *
 * n tokens (sequences of t), c channels, v vocabulary, s learned positions.   ids[n]  w[v,c]  y[n,c]
 *   embedding_fwd: y = w[ids]                  writes y;   a token outside the vocabulary gives a row of NaN
 *   embedding_dw:  dw[ids] += dy               accumulates
 *   position_fwd:  y = x + w[row % t]          writes y
 *   position_dw:   dw[row % t] += dy           accumulates
 * Moves, with e bytes an element (4 or 2), 2 e n c bytes (fwd; position 3 e n c at most), (e + 8) n c (dw: the rows
 * that occur, read and written, and dy).
 * The trick: embedding_dw has a block for each token. One whose number stood further ahead has nothing to do; the first
 * one gathers all tokens of its number and adds them in their order, so that no atomics are needed and the bits are
 * those of a loop. position_dw sums over the sequences in order.
 */
#include "device.cuh"

template <typename A>
HP_FN void embedding_fwd(A *__restrict__ y, const int32_t *__restrict__ ids, const A *__restrict__ w, int64_t n,
    int64_t v, int64_t c) {
  constexpr int W = hp_vector<A>::size;
  const bool whole = c % W == 0;
  for (int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y; row < n; row += (int64_t)gridDim.x * blockDim.y) {
    const int64_t id = ids[row];
    const bool known = id >= 0 && id < v;
#pragma unroll 2
    for (int64_t j = threadIdx.x * W; j < c; j += blockDim.x * W) {
      float value[W];
#pragma unroll
      for (int i = 0; i < W; i++) value[i] = hp_nan();
      if (known) hp_load_row(w + id * c + j, whole, c - j, value);
      hp_store_row(y + row * c + j, whole, c - j, value);
    }
  }
}
HP_ENTRY(embedding_fwd, 256, (A *y, const int32_t *ids, const A *w, int64_t n, int64_t v, int64_t c),
    (y, ids, w, n, v, c))

/* Blocks of THREADS over tokens and slabs of THREADS * W columns. Ids are looked at CHUNK at a time. */
#define THREADS 128
#define CHUNK 1024
#define EIGHT_BLOCKS 128, 8 /* of 128 threads on a multiprocessor */
template <typename A>
HP_FN void embedding_dw(float *__restrict__ dw, const A *__restrict__ dy, const int32_t *__restrict__ ids, int64_t n,
    int64_t v, int64_t c) {
  constexpr int W = hp_vector<A>::size;
  __shared__ uint32_t same[CHUNK / 32]; /* bit b of word i: token 32 i + b of the chunk has the number */
  __shared__ int list[CHUNK], length, before[2];
  const int token = (int)blockIdx.x, tokens = (int)n, id = ids[token], thread = (int)threadIdx.x;
  if (id < 0 || id >= v) return;

  /* Stood the number further ahead? Two flags in turn: one is written while the last reader may look at the other. */
  if (thread < 2) before[thread] = 0;
  __syncthreads();
  for (int start = 0, turn = 0; start < token; start += CHUNK, turn ^= 1) {
    bool found = false;
    for (int i = start + thread; i < token && i < start + CHUNK; i += THREADS) found |= ids[i] == id;
    if (found) before[turn] = 1;
    __syncthreads();
    if (before[turn]) return;
  }

  const int j = ((int)blockIdx.y * THREADS + thread) * W, left = (int)c - j;
  const bool whole = c % W == 0;
  float sum[W] = {};
  if (left > 0) hp_load_row(dw + id * c + j, whole, left, sum);
  for (int start = token; start < tokens; start += CHUNK) {
#pragma unroll
    for (int k = 0; k < CHUNK / THREADS; k++) {
      const int i = start + k * THREADS + thread;
      const uint32_t word = __ballot_sync(0xffffffffu, i < tokens && ids[i] == id);
      if (hp_lane() == 0) same[k * (THREADS / 32) + hp_warp()] = word;
    }
    __syncthreads();
    if (hp_warp() == 0) { /* words to positions, in order */
      uint32_t word = same[thread];
      int end = __popc(word);
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int below = __shfl_sync(0xffffffffu, end, thread >= step ? thread - step : thread);
        end += thread >= step ? below : 0;
      }
      for (int at = end - __popc(word); word; word &= word - 1) list[at++] = 32 * thread + __ffs((int)word) - 1;
      if (thread == 31) length = end;
    }
    __syncthreads();
    const int found = length;
    if (left > 0) {
#pragma unroll 4
      for (int q = 0; q < found; q++) {
        float d[W];
        hp_load_row(dy + (start + list[q]) * c + j, whole, left, d);
#pragma unroll
        for (int i = 0; i < W; i++) sum[i] += d[i];
      }
    }
    __syncthreads();
  }
  if (left > 0) hp_store_row(dw + id * c + j, whole, left, sum);
}
HP_ENTRY(embedding_dw, EIGHT_BLOCKS, (float *dw, const A *dy, const int32_t *ids, int64_t n, int64_t v, int64_t c),
    (dw, dy, ids, n, v, c))

template <typename A>
HP_FN void position_fwd(A *__restrict__ y, const A *__restrict__ x, const A *__restrict__ w, int64_t n, int64_t c,
    int64_t t) {
  constexpr int W = hp_vector<A>::size;
  const bool whole = c % W == 0;
  for (int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y; row < n; row += (int64_t)gridDim.x * blockDim.y) {
    const int64_t position = (uint32_t)row % (uint32_t)t;
    for (int64_t j = threadIdx.x * W; j < c; j += blockDim.x * W) {
      float value[W], add[W];
      hp_load_row(x + row * c + j, whole, c - j, value);
      hp_load_row(w + position * c + j, whole, c - j, add);
#pragma unroll
      for (int i = 0; i < W; i++) value[i] += add[i];
      hp_store_row(y + row * c + j, whole, c - j, value);
    }
  }
}
HP_ENTRY(position_fwd, 256, (A *y, const A *x, const A *w, int64_t n, int64_t s, int64_t c, int64_t t),
    (y, x, w, n, c, t))

template <typename A>
HP_FN void position_dw(float *__restrict__ dw, const A *__restrict__ dy, int64_t n, int64_t c, int64_t t) {
  constexpr int W = hp_vector<A>::size;
  const bool whole = c % W == 0;
  const int64_t positions = hp_smaller(t, n);
  for (int64_t p = (int64_t)blockIdx.x * blockDim.y + threadIdx.y; p < positions;
       p += (int64_t)gridDim.x * blockDim.y)
    for (int64_t j = threadIdx.x * W; j < c; j += blockDim.x * W) {
      float sum[W];
      hp_load_row(dw + p * c + j, whole, c - j, sum);
      const A *from = dy + p * c + j;
#pragma unroll 4
      for (int left = (int)((uint32_t)(n - p + t - 1) / (uint32_t)t); left > 0; left--, from += t * c) {
        float d[W];
        hp_load_row(from, whole, c - j, d);
#pragma unroll
        for (int i = 0; i < W; i++) sum[i] += d[i];
      }
      hp_store_row(dw + p * c + j, whole, c - j, sum);
    }
}
HP_ENTRY(position_dw, 256, (float *dw, const A *dy, int64_t n, int64_t s, int64_t c, int64_t t), (dw, dy, n, c, t))
