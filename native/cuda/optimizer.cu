/* optimizer.cu: what happens to n parameters or gradients at the end of a step; the twin of native/cpu/optimizer.c.
 *
 *   accumulate: acc += x                                                                        12 n bytes
 *   sumsq:      s = sum of x^2 in float64                                                         4 n bytes
 *   adamw_step: g' = scale g;  m = b1 m + (1-b1) g';  v = b2 v + (1-b2) g'^2;
 *               p -= lr (m / (1-b1^step) / (sqrt(v / (1-b2^step)) + eps) + decay p);  g = 0      32 n bytes
 *   adamw_try:  old = p, and p as in adamw_step; m, v and g stay                                 24 n bytes
 *   Where half is there it gets the new p as bfloat16, 2 n bytes more.
 *   adamw_keep: m and v as in adamw_step, g = 0: with adamw_try before it the same to the bit    24 n bytes
 * accumulate adds, sumsq writes, the others update in place.
 * The trick: some GPUs have little float64. sumsq adds 16 squares at a time in two floats, high and low, without loss
 * (Knuth's sum), and only their total as a double; where a square could over- or underflow it takes doubles from the
 * start. It adds blocks whose number and size depend on n alone, and then the blocks in a fixed order.
 */
#include "device.cuh"

extern "C" __global__ void __launch_bounds__(256) hp_accumulate(float *__restrict__ acc, const float *__restrict__ x,
    int64_t n) {
  hp_each_vector<4>(n, [&](int64_t e, int64_t count) {
    float a[4], b[4];
    hp_load_upto(acc + e, count, a);
    hp_load_upto(x + e, count, b);
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] += b[i];
    hp_store_upto(acc + e, count, a);
  });
}

/* Sum of squares of N numbers: high + low in float32, exact but for the sum of the lows. A square must be rounded on
 * its own, not be half of a fused multiply-add: hence __fmul_rn. */
#define LEAST 0x1p-50f
#define MOST 0x1p+50f
template <int N>
HP_FN double squares_of(const float (&x)[N]) {
  bool plain = true;
#pragma unroll
  for (int i = 0; i < N; i++) plain &= x[i] == 0 || (fabsf(x[i]) >= LEAST && fabsf(x[i]) <= MOST);
  if (!plain) {
    double sum = 0;
    for (int i = 0; i < N; i++) sum += (double)x[i] * (double)x[i];
    return sum;
  }
  float high = 0, low = 0;
#pragma unroll
  for (int i = 0; i < N; i++) {
    const float square = __fmul_rn(x[i], x[i]), lost = fmaf(x[i], x[i], -square);
    const float sum = high + square, part = sum - high;
    low += ((high - (sum - part)) + (square - part)) + lost;
    high = sum;
  }
  return (double)high + (double)low;
}

/* Blocks of 256 threads, each over `size` numbers, a multiple of 4096; work[block] in float64. */
extern "C" __global__ void __launch_bounds__(256) hp_sumsq_blocks(const float *__restrict__ x, int64_t n, int64_t size,
    void *work) {
  __shared__ double room[32];
  const int64_t end = hp_smaller(n, (blockIdx.x + 1) * size);
  double sum = 0;
  for (int64_t start = blockIdx.x * size; start < end; start += 4096) {
    float v[16];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      float quarter[4] = {};
      const int64_t e = start + 1024 * k + 4 * threadIdx.x;
      if (e < end) hp_load_upto(x + e, end - e, quarter);
#pragma unroll
      for (int i = 0; i < 4; i++) v[4 * k + i] = quarter[i];
    }
    sum += squares_of(v);
  }
  sum = hp_block_sum(sum, room);
  if (threadIdx.x == 0) ((double *)work)[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(256) hp_sumsq_total(double *s, int64_t blocks, const void *work) {
  __shared__ double room[32];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += blockDim.x) sum += ((const double *)work)[i];
  sum = hp_block_sum(sum, room);
  if (threadIdx.x == 0) *s = sum;
}

/* One thread turns float64 into what all need. */
HP_FN hp_adamw settings(const double *hyper, float decay) {
  __shared__ hp_adamw room;
  if (threadIdx.x == 0)
    room = hp_adamw{(float)hyper[0], (float)hyper[1], (float)hyper[2], (float)(1.0 - hyper[1]),
        (float)(1.0 - hyper[2]), (float)hyper[3], (float)(1.0 / hyper[4]), (float)(1.0 / hyper[5]), (float)hyper[6],
        decay};
  __syncthreads();
  return room;
}

/* By formula.h, as hp_halve does it: the copy of a parameter has one value, whoever made it. */
HP_FN void store_half(uint16_t *half, int64_t count, const float (&v)[4]) {
  if (count >= 4) {
    *reinterpret_cast<uint2 *>(half) =
        make_uint2((uint32_t)hp_bfloat16_of(v[0]) | (uint32_t)hp_bfloat16_of(v[1]) << 16,
            (uint32_t)hp_bfloat16_of(v[2]) | (uint32_t)hp_bfloat16_of(v[3]) << 16);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (i < count) half[i] = hp_bfloat16_of(v[i]);
  }
}

extern "C" __global__ void __launch_bounds__(256) hp_adamw_step(float *__restrict__ p, float *__restrict__ g,
    float *__restrict__ m, float *__restrict__ v, uint16_t *__restrict__ half, const double *__restrict__ hyper,
    int64_t n, float decay) {
  const hp_adamw a = settings(hyper, decay);
  hp_each_vector<4>(n, [&](int64_t e, int64_t count) {
    float value[4], slope[4], first[4], second[4];
    hp_load_upto(p + e, count, value);
    hp_load_upto(g + e, count, slope);
    hp_load_upto(m + e, count, first);
    hp_load_upto(v + e, count, second);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float m1, v1;
      hp_adamw_moments(&a, slope[i], first[i], second[i], &m1, &v1);
      value[i] = hp_adamw_value(&a, value[i], m1, v1);
      first[i] = m1, second[i] = v1, slope[i] = 0;
    }
    hp_store_upto(p + e, count, value);
    hp_store_upto(m + e, count, first);
    hp_store_upto(v + e, count, second);
    hp_store_upto(g + e, count, slope);
    if (half) store_half(half + e, count, value);
  });
}

extern "C" __global__ void __launch_bounds__(256) hp_adamw_try(float *__restrict__ old, float *__restrict__ p,
    const float *__restrict__ g, const float *__restrict__ m, const float *__restrict__ v, uint16_t *__restrict__ half,
    const double *__restrict__ hyper, int64_t n, float decay) {
  const hp_adamw a = settings(hyper, decay);
  hp_each_vector<4>(n, [&](int64_t e, int64_t count) {
    float value[4], slope[4], first[4], second[4];
    hp_load_upto(p + e, count, value);
    hp_load_upto(g + e, count, slope);
    hp_load_upto(m + e, count, first);
    hp_load_upto(v + e, count, second);
    hp_store_upto(old + e, count, value);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float m1, v1;
      hp_adamw_moments(&a, slope[i], first[i], second[i], &m1, &v1);
      value[i] = hp_adamw_value(&a, value[i], m1, v1);
    }
    hp_store_upto(p + e, count, value);
    if (half) store_half(half + e, count, value);
  });
}

extern "C" __global__ void __launch_bounds__(256) hp_adamw_keep(float *__restrict__ g, float *__restrict__ m,
    float *__restrict__ v, const double *__restrict__ hyper, int64_t n) {
  const hp_adamw a = settings(hyper, 0);
  hp_each_vector<4>(n, [&](int64_t e, int64_t count) {
    float slope[4], first[4], second[4];
    hp_load_upto(g + e, count, slope);
    hp_load_upto(m + e, count, first);
    hp_load_upto(v + e, count, second);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float m1, v1;
      hp_adamw_moments(&a, slope[i], first[i], second[i], &m1, &v1);
      first[i] = m1, second[i] = v1, slope[i] = 0;
    }
    hp_store_upto(m + e, count, first);
    hp_store_upto(v + e, count, second);
    hp_store_upto(g + e, count, slope);
  });
}
