/* rope.cu: rotary positions (Su et al. 2021), in place on the query and key heads; the twin of native/cpu/rope.c.
 *
 * n tokens (sequences of t), h query heads, k key heads, d head width; qkv[n,(h+2k) d] = [q heads | k heads | v heads].
 *   pairs (i, i + d/2) of each head turn by angle = (row % t) theta^(-2i/d):  (a, b) -> (a cos - b sin, b cos + a sin)
 * fwd rotates, dx rotates back; both overwrite. Moves, with e bytes an element (4 or 2), 2 e n (h + k) d bytes.
 * The trick: angles are float64, of which some GPUs have little. The launcher gives theta^(-2/d), as the bits of a
 * double; a block raises it to its powers once, by repeated squaring; then, position after position, it makes d/2 sines
 * and cosines (eight operations in float64 each) in shared memory, for all heads of all sequences.
 */
#include "device.cuh"

HP_FN double power_of(double x, int exponent) {
  double result = 1;
  for (; exponent; exponent >>= 1, x *= x)
    if (exponent & 1) result *= x;
  return result;
}

/* Blocks of (threads along a head, heads). */
template <typename A>
HP_FN void rotate(A *__restrict__ qkv, int64_t n, int64_t t, int64_t h, int64_t k, int64_t d, int64_t ratio_bits,
    float sign) {
  constexpr int W = hp_vector<A>::size;
  const int half = (int)(d / 2), heads = (int)(h + k);
  const bool whole = half % W == 0;
  HP_DYNAMIC_SHARED(double, frequency);
  float *const cosine = (float *)(frequency + half), *const sine = cosine + half;
  double ratio;
  memcpy(&ratio, &ratio_bits, sizeof ratio);
  for (int i = hp_thread(); i < half; i += hp_threads()) frequency[i] = power_of(ratio, i);
  for (int64_t p = blockIdx.x; p < hp_smaller(t, n); p += gridDim.x) {
    __syncthreads();
    for (int i = hp_thread(); i < half; i += hp_threads()) {
      float s, c;
      hp_sincos((double)p * frequency[i], &s, &c);
      sine[i] = sign * s;
      cosine[i] = c;
    }
    __syncthreads();
    const int items = (int)((n - p + t - 1) / t) * heads;
    for (int item = threadIdx.y; item < items; item += blockDim.y) {
      A *const head = qkv + (p + item / heads * t) * (h + 2 * k) * d + item % heads * d;
      for (int j = threadIdx.x * W; j < half; j += blockDim.x * W) {
        float a[W], b[W], c[W], s[W];
        hp_load_row(head + j, whole, half - j, a);
        hp_load_row(head + half + j, whole, half - j, b);
        hp_load_row(cosine + j, whole, half - j, c);
        hp_load_row(sine + j, whole, half - j, s);
#pragma unroll
        for (int i = 0; i < W; i++) {
          const float turned = a[i] * c[i] - b[i] * s[i];
          b[i] = b[i] * c[i] + a[i] * s[i];
          a[i] = turned;
        }
        hp_store_row(head + j, whole, half - j, a);
        hp_store_row(head + half + j, whole, half - j, b);
      }
    }
  }
}

template <typename A>
HP_FN void rope_fwd(A *qkv, int64_t n, int64_t t, int64_t h, int64_t k, int64_t d, int64_t ratio_bits) {
  rotate(qkv, n, t, h, k, d, ratio_bits, 1.0f);
}
HP_ENTRY(rope_fwd, 256, (A *qkv, int64_t n, int64_t t, int64_t h, int64_t k, int64_t d, float theta,
    int64_t ratio_bits), (qkv, n, t, h, k, d, ratio_bits))

template <typename A>
HP_FN void rope_dx(A *dqkv, int64_t n, int64_t t, int64_t h, int64_t k, int64_t d, int64_t ratio_bits) {
  rotate(dqkv, n, t, h, k, d, ratio_bits, -1.0f);
}
HP_ENTRY(rope_dx, 256, (A *dqkv, int64_t n, int64_t t, int64_t h, int64_t k, int64_t d, float theta,
    int64_t ratio_bits), (dqkv, n, t, h, k, d, ratio_bits))
