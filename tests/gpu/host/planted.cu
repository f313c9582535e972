/* planted.cu: kernels that tests of the emulator need, right ones and wrong ones. No part of hpcpipe.
 *
 * n, c: sizes; every kernel is launched with one block unless it says otherwise. */
#include "device.cuh"

/* y[i] += s, one thread per element, any grid: the plainest kernel, for tests of streams. */
extern "C" __global__ void hp_add(float *y, int64_t n, float s) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] += s;
}

/* y[0] = sum of x[0..n), y[1] = its maximum, over a block. */
template <typename A>
HP_FN void reduced(float *y, const A *x, int64_t n) {
  __shared__ float room[32];
  float sum = 0.0f, most = -INFINITY;
  for (int64_t i = hp_thread(); i < n; i += hp_threads()) sum += hp_get(x[i]), most = hp_max(most, hp_get(x[i]));
  sum = hp_block_sum(sum, room), most = hp_block_max(most, room);
  if (hp_thread() == 0) y[0] = sum, y[1] = most;
}
HP_ENTRY(reduced, 1024, (float *y, const A *x, int64_t n), (y, x, n))

/* y = the elements of x in reverse, through shared memory; hp_reversed_racing forgets the barrier. */
template <bool BARRIER>
HP_FN void reversed(float *y, const float *x) {
  HP_DYNAMIC_SHARED(float, held);
  held[threadIdx.x] = x[threadIdx.x];
  if (BARRIER) __syncthreads();
  y[threadIdx.x] = held[blockDim.x - 1 - threadIdx.x];
}
extern "C" __global__ void __launch_bounds__(256) hp_reversed(float *y, const float *x) { reversed<true>(y, x); }
extern "C" __global__ void __launch_bounds__(256) hp_reversed_racing(float *y, const float *x) { reversed<false>(y, x); }

/* Blocks that read what another block writes: y[b] = y[b - 1] + 1. */
extern "C" __global__ void hp_blocks_racing(float *y) {
  if (threadIdx.x == 0) y[blockIdx.x] = (blockIdx.x ? y[blockIdx.x - 1] : 0.0f) + 1.0f;
}

/* Thread `odd` never comes to the barrier, or waits in a shuffle meanwhile. */
extern "C" __global__ void hp_barrier_missed(int64_t odd) {
  if (threadIdx.x != odd) __syncthreads();
}
extern "C" __global__ void hp_barrier_or_shuffle(float *y, int64_t odd) {
  if (threadIdx.x == odd) y[0] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  __syncthreads();
}
/* A shuffle whose mask names a lane that has returned; and one whose mask lacks the lane that calls. */
extern "C" __global__ void hp_shuffle_without(float *y, int64_t gone) {
  if (threadIdx.x == gone) return;
  y[threadIdx.x] = __shfl_sync(0xffffffffu, 1.0f, 0);
}
extern "C" __global__ void hp_shuffle_outside(float *y) { y[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.0f, 0); }

/* Writes one float behind its dynamic shared memory of n floats; reads shared memory that nobody wrote. */
extern "C" __global__ void hp_shared_overrun(int64_t n) {
  HP_DYNAMIC_SHARED(float, held);
  held[n] = 1.0f;
}
template <typename A>
HP_FN void unwritten(float *y) {
  __shared__ float room[8];
  HP_DYNAMIC_SHARED(float, held);
  y[threadIdx.x] = room[threadIdx.x % 8], y[blockDim.x + threadIdx.x] = held[threadIdx.x];
  __syncthreads();
  room[threadIdx.x % 8] = 0.0f, held[threadIdx.x] = 0.0f; /* for the next block to find, if it could */
}
extern "C" __global__ void hp_unwritten(float *y) { unwritten<float>(y + 2 * blockDim.x * blockIdx.x); }

/* y = four shuffles of the lanes' numbers, 32 each: index, xor, down (of 16), up. */
extern "C" __global__ void hp_shuffles(float *y, const float *x) {
  const float v = x[threadIdx.x];
  y[threadIdx.x] = __shfl_sync(0xffffffffu, v, (int)threadIdx.x * 7);
  y[32 + threadIdx.x] = __shfl_xor_sync(0xffffffffu, v, 5);
  y[64 + threadIdx.x] = __shfl_down_sync(0xffffffffu, v, 3, 16);
  y[96 + threadIdx.x] = __shfl_up_sync(0xffffffffu, v, 9);
}
/* The two halves of a warp shuffle among themselves, each in its branch. */
extern "C" __global__ void hp_shuffle_halves(float *y, const float *x) {
  if (threadIdx.x < 16) {
    y[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, x[threadIdx.x], 1);
  } else {
    y[threadIdx.x] = __shfl_xor_sync(0xffff0000u, x[threadIdx.x], 2);
  }
}

/* d[16,8] += a[16,16] b[16,8] of bfloat16: a through cp.async and ldmatrix, b[k,n] through the transposed ldmatrix.
 * hp_product_early does not wait for its copies. */
template <bool WAIT>
HP_FN void product(float *d, const uint16_t *a, const uint16_t *b) {
  __shared__ __align__(16) uint16_t rows[16 * 16 + 16 * 8];
  uint16_t *const columns = rows + 256;
  const int lane = hp_lane(), g = lane / 4, t = lane % 4;
  hp_copy_async(rows + 8 * lane, a + 8 * lane);
  hp_copy_commit();
  if (lane < 16) hp_copy_async(columns + 8 * lane, b + 8 * lane);
  hp_copy_commit();
  if (WAIT) hp_copy_wait<0>();
  __syncwarp();
  uint32_t af[4], bf[2];
  hp_ldmatrix4(af, rows + 16 * (lane % 16) + 8 * (lane / 16));
  hp_ldmatrix2_transposed(bf, columns + 8 * (lane % 16));
  float sum[4] = {d[8 * g + 2 * t], d[8 * g + 2 * t + 1], d[8 * (g + 8) + 2 * t], d[8 * (g + 8) + 2 * t + 1]};
  hp_mma_bfloat16(sum, af, bf);
  d[8 * g + 2 * t] = sum[0], d[8 * g + 2 * t + 1] = sum[1];
  d[8 * (g + 8) + 2 * t] = sum[2], d[8 * (g + 8) + 2 * t + 1] = sum[3];
}
extern "C" __global__ void hp_product(float *d, const uint16_t *a, const uint16_t *b) { product<true>(d, a, b); }
extern "C" __global__ void hp_product_early(float *d, const uint16_t *a, const uint16_t *b) { product<false>(d, a, b); }

/* d[16,8] += a[16,8] b[8,8], TF32. */
extern "C" __global__ void hp_product_tf32(float *d, const float *a, const float *b) {
  const int g = hp_lane() / 4, t = hp_lane() % 4;
  const uint32_t af[4] = {hp_tf32_of(a[8 * g + t]), hp_tf32_of(a[8 * (g + 8) + t]), hp_tf32_of(a[8 * g + t + 4]),
                          hp_tf32_of(a[8 * (g + 8) + t + 4])};
  const uint32_t bf[2] = {hp_tf32_of(b[8 * t + g]), hp_tf32_of(b[8 * (t + 4) + g])};
  float sum[4] = {d[8 * g + 2 * t], d[8 * g + 2 * t + 1], d[8 * (g + 8) + 2 * t], d[8 * (g + 8) + 2 * t + 1]};
  hp_mma_tf32(sum, af, bf);
  d[8 * g + 2 * t] = sum[0], d[8 * g + 2 * t + 1] = sum[1];
  d[8 * (g + 8) + 2 * t] = sum[2], d[8 * (g + 8) + 2 * t + 1] = sum[3];
}

/* y = x, n elements, by the 16-byte accesses where they are aligned, else one by one. */
template <typename A>
HP_FN void passed(A *y, const A *x, int64_t n) {
  const int size = hp_vector<A>::size;
  const bool aligned = hp_rows_aligned(x, 0) && hp_rows_aligned(y, 0);
  for (int64_t i = (int64_t)hp_thread() * size; i < n; i += (int64_t)hp_threads() * size) {
    float v[size];
    if (aligned && i + size <= n) {
      hp_load(x + i, v), hp_store(y + i, v);
    } else {
      hp_load_some(x + i, n - i, v), hp_store_some(y + i, n - i, v);
    }
  }
}
HP_ENTRY(passed, 128, (A *y, const A *x, int64_t n), (y, x, n))
