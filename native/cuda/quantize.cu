/* quantize.cu: from the compute type to eight or four bits, with scales, for products that cuBLASLt does in these.
 *
 * x[n,c] becomes q[n,c], scaled along its rows, and qt[c,n], the transpose, scaled along its own; either may be absent
 * (0). Codes: e4m3 (e5m2 where `wide`), or e2m1, two in a byte, the first one low. x = code scale (what was rounded
 * away aside); scales of q over n rows of g = ceil(c / group) groups, of qt with n and c changed:
 *   tensor  one float for both                            multiplier = largest / amax, scale = 1 / multiplier
 *   rows    groups of 128: float[g,n], a column of scales for each group                          the same, of a group
 *   blocks  128 x 128: float[ceil(n/128), g rounded up to 4]                                      the same, of a block
 *   mx      groups of 32: E8M0 bytes, tiled               scale = 2^e, the least e with amax <= largest 2^e
 *   nv      groups of 16: E4M3 bytes, tiled, and a float  encode = 2688 / amax of x, what is stored is e4m3(amax of the
 *           group / 6 encode), multiplier = encode / stored; the float is 1 / encode
 * Tiled: tiles of 128 rows by 4 groups, 512 bytes each, row-major; in a tile, row r and group k at
 * (r % 32) 16 + (r / 32) 4 + k; what is beyond the matrix is 0. This is what cuBLAS' documentation calls the 1D block
 * scaling factors layout (128x4 tiles); `rows` and `blocks` are its layouts of 128-element scales, M-major and K-major.
 * A multiplier is at most 2^126, and 1 for nothing but zeros; a float32 below 2^-126 counts as zero. A NaN or an
 * infinity in a group makes its scale or all of its codes NaN (e2m1 has none: there it is the scale): it is not hidden.
 * Moves x once, q and qt once. The trick: a tile of 128 x 128 lies in shared memory, and rows and columns of it are the
 * same work: a warp takes a line, lane l the elements l, l + 32, l + 64, l + 96, so that no bank is asked twice.
 */
#include "device.cuh"

typedef unsigned char hp_byte;

enum { THREADS = 256, TILE = 128, PITCH = TILE + 1 };
enum { TENSOR, ROWS, BLOCKS, MX, NV };

#define LARGEST_MULTIPLIER 8.507059173023462e37f /* 2^126 */

HP_FN float largest_of(bool wide) { return wide ? 57344.0f : 448.0f; }

/* What x is multiplied with so that `amax` becomes `largest`. */
HP_FN float multiplier_of(float amax, float largest) {
  if (amax < 1.17549435e-38f) return 1.0f;
  const float multiplier = largest / amax;
  return multiplier > LARGEST_MULTIPLIER ? LARGEST_MULTIPLIER : multiplier;
}

/* The E8M0 byte, e + 127, of the least e with amax <= largest 2^e; the largest is 1.75 2^8 or 1.75 2^15. */
HP_FN int32_t exponent_of(float amax, bool wide) {
  const int32_t bits = hp_bits_of(amax), exponent = bits >> 23;
  if (exponent == 0) return 0;
  if (exponent == 255) return 255;
  const int32_t e = exponent - (wide ? 15 : 8) + ((bits & 0x7fffff) > 0x600000);
  return e < 0 ? 0 : e;
}
/* 2^-e as a float, of the byte; a NaN of a NaN. */
HP_FN float inverse_of(int32_t byte) {
  return byte == 255 ? hp_float_of(0x7fc00000) : hp_float_of((254 - byte) << 23);
}

HP_FN int64_t tiles(int64_t size, int64_t width) { return (size + width - 1) / width; }

/* Where the scale of a row and group lies among those of `groups` groups. */
HP_FN int64_t tiled(int64_t row, int64_t group, int64_t groups) {
  return (row / 128 * tiles(groups, 4) + group / 4) * 512 + row % 32 * 16 + row / 32 % 4 * 4 + group % 4;
}

/* One of two lies of the matrix: `rows` lines of `cols` elements. */
typedef struct {
  hp_byte *q;
  void *scales;
  int64_t rows, cols;
} hp_codes;

/* Codes of one line of a tile, a warp together: v[e] is element l + 32 e. `given`: amax of all x, or of the tile. */
template <int KIND>
HP_FN void encode(const hp_codes &to, const float (&v)[4], int64_t row, int64_t col, float given, bool wide) {
  float multiplier[4];
  const int lane = hp_lane();
  if (KIND == TENSOR || KIND == BLOCKS) {
    multiplier[0] = multiplier[1] = multiplier[2] = multiplier[3] = multiplier_of(given, largest_of(wide));
  } else if (KIND == ROWS) {
    const float amax = hp_max(hp_max(fabsf(v[0]), fabsf(v[1])), hp_max(fabsf(v[2]), fabsf(v[3])));
    const float one = multiplier_of(hp_warp_max(amax), largest_of(wide));
    multiplier[0] = multiplier[1] = multiplier[2] = multiplier[3] = one;
    if (lane == 0 && row < to.rows) ((float *)to.scales)[col / TILE * to.rows + row] = 1.0f / one;
  } else {
    const int size = KIND == MX ? 32 : 16;
    const float encode_all = KIND == NV ? multiplier_of(given, 2688.0f) : 0.0f;
    const int64_t groups = tiles(to.cols, size);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      float amax = fabsf(v[e]);
#pragma unroll
      for (int step = size / 2; step > 0; step >>= 1) amax = hp_max(amax, __shfl_xor_sync(0xffffffffu, amax, step));
      const int64_t group = (col + 32 * e + lane) / size;
      uint32_t stored;
      if (KIND == MX) {
        stored = exponent_of(amax, wide);
        multiplier[e] = inverse_of((int32_t)stored);
      } else {
        stored = hp_e4m3x2_of(amax / 6.0f * encode_all, 0.0f) & 0xffu;
        const float ratio = encode_all / hp_float_of_e4m3(stored);
        multiplier[e] = stored == 0 ? 0.0f : ratio > LARGEST_MULTIPLIER ? LARGEST_MULTIPLIER : ratio;
      }
      /* The padding of a tile has scales too: lines beyond the matrix are zeros. */
      if (lane % size == 0 && group < tiles(groups, 4) * 4) {
        ((hp_byte *)to.scales)[tiled(row, group, groups)] = (hp_byte)(row < to.rows && group < groups ? stored : 0);
      }
    }
  }
  const int64_t width = KIND == NV ? tiles(to.cols, 2) : to.cols;
#pragma unroll
  for (int e = 0; e < 4; e += 2) {
    const float low = v[e] * multiplier[e], high = v[e + 1] * multiplier[e + 1];
    if (KIND == NV) {
      const float low_next = __shfl_down_sync(0xffffffffu, low, 1), high_next = __shfl_down_sync(0xffffffffu, high, 1);
      const uint32_t pair = hp_e2m1x2_of(low, low_next) | hp_e2m1x2_of(high, high_next) << 8;
      const int64_t at = (col + 32 * e + lane) / 2;
      if (lane % 2 == 0 && row < to.rows && at < width) to.q[row * width + at] = (hp_byte)pair;
      if (lane % 2 == 0 && row < to.rows && at + 16 < width) to.q[row * width + at + 16] = (hp_byte)(pair >> 8);
    } else {
      const uint32_t pair = wide ? hp_e5m2x2_of(low, high) : hp_e4m3x2_of(low, high);
      const int64_t at = col + 32 * e + lane;
      if (row < to.rows && at < width) to.q[row * width + at] = (hp_byte)pair;
      if (row < to.rows && at + 32 < width) to.q[row * width + at + 32] = (hp_byte)(pair >> 8);
    }
  }
}

/* grid = (tiles of columns, tiles of rows) */
template <int KIND, typename A>
HP_FN void quantize(hp_byte *q, void *scales, hp_byte *qt, void *scales_t, const A *x, const float *amax, int64_t n,
    int64_t c, bool wide) {
  HP_DYNAMIC_SHARED(float, tile); /* [TILE][PITCH] */
  __shared__ float room[32];
  const int64_t i0 = (int64_t)blockIdx.y * TILE, j0 = (int64_t)blockIdx.x * TILE;
  const bool aligned = hp_rows_aligned(x, c);
  enum { N = hp_vector<A>::size, WIDTH = TILE / N };
  float own = 0;
#pragma unroll 4
  for (int chunk = hp_thread(); chunk < TILE * WIDTH; chunk += THREADS) {
    const int row = chunk / WIDTH, col = chunk % WIDTH * N;
    float v[N] = {};
    if (i0 + row < n && j0 + col < c) {
      if (aligned) hp_load(x + (i0 + row) * c + j0 + col, v);
      else hp_load_some(x + (i0 + row) * c + j0 + col, c - j0 - col, v);
    }
#pragma unroll
    for (int e = 0; e < N; e++) tile[row * PITCH + col + e] = v[e], own = hp_max(own, fabsf(v[e]));
  }
  float given = KIND == TENSOR || KIND == NV ? *amax : 0.0f;
  if (KIND == BLOCKS) given = hp_block_max(own, room);
  __syncthreads();
  const hp_codes along = {q, scales, n, c}, across = {qt, scales_t, c, n};
  for (int line = hp_warp(); line < TILE; line += THREADS / 32) {
    float v[4];
    if (q) {
#pragma unroll
      for (int e = 0; e < 4; e++) v[e] = tile[line * PITCH + hp_lane() + 32 * e];
      encode<KIND>(along, v, i0 + line, j0, given, wide);
    }
    if (qt) {
#pragma unroll
      for (int e = 0; e < 4; e++) v[e] = tile[(hp_lane() + 32 * e) * PITCH + line];
      encode<KIND>(across, v, j0 + line, i0, given, wide);
    }
  }
  if (hp_thread() != 0) return;
  if (KIND == BLOCKS) {
    const float scale = 1.0f / multiplier_of(given, largest_of(wide));
    if (q) ((float *)scales)[blockIdx.y * (tiles(c, 512) * 4) + blockIdx.x] = scale;
    if (qt) ((float *)scales_t)[blockIdx.x * (tiles(n, 512) * 4) + blockIdx.y] = scale;
    for (int64_t pad = gridDim.x; q && blockIdx.x == 0 && pad < tiles(c, 512) * 4; pad++) {
      ((float *)scales)[blockIdx.y * (tiles(c, 512) * 4) + pad] = 0.0f;
    }
    for (int64_t pad = gridDim.y; qt && blockIdx.y == 0 && pad < tiles(n, 512) * 4; pad++) {
      ((float *)scales_t)[blockIdx.x * (tiles(n, 512) * 4) + pad] = 0.0f;
    }
  }
}

/* The float of a whole tensor: its scale, for codes whose largest is `largest`. */
extern "C" __global__ void __launch_bounds__(32) hp_quantize_scale(float *scale, const float *amax, float largest) {
  if (hp_thread() == 0) *scale = 1.0f / multiplier_of(*amax, largest);
}

/* The largest |x|: of a block of threads each, then of all. A maximum does not depend on its order. */
template <typename A>
HP_FN void amax_blocks(const A *x, int64_t n, float *most) {
  enum { N = hp_vector<A>::size };
  __shared__ float room[32];
  const int64_t step = (int64_t)gridDim.x * THREADS * N;
  float own = 0, v[N];
  for (int64_t i = ((int64_t)blockIdx.x * THREADS + hp_thread()) * N; i < n; i += step) {
    if (i + N <= n) hp_load(x + i, v);
    else hp_load_some(x + i, n - i, v);
#pragma unroll
    for (int e = 0; e < N; e++) own = hp_max(own, fabsf(v[e]));
  }
  own = hp_block_max(own, room);
  if (hp_thread() == 0) most[blockIdx.x] = own;
}
extern "C" __global__ void __launch_bounds__(THREADS) hp_quantize_amax_blocks(const float *x, int64_t n, void *work) {
  amax_blocks(x, n, (float *)work);
}
extern "C" __global__ void __launch_bounds__(THREADS) hp_quantize_amax_blocks_h(const uint16_t *x, int64_t n,
    void *work) {
  amax_blocks(x, n, (float *)work);
}
extern "C" __global__ void __launch_bounds__(THREADS) hp_quantize_amax_total(float *amax, int64_t blocks, void *work) {
  __shared__ float room[32];
  float own = 0;
  for (int64_t i = hp_thread(); i < blocks; i += THREADS) own = hp_max(own, ((const float *)work)[i]);
  own = hp_block_max(own, room);
  if (hp_thread() == 0) *amax = own;
}

#define ENTRIES(name, KIND)                                                                                            \
  extern "C" __global__ void __launch_bounds__(THREADS) hp_quantize_##name(hp_byte *q, void *scales, hp_byte *qt,      \
      void *scales_t, const float *x, const float *amax, int64_t n, int64_t c, int64_t wide) {                         \
    quantize<KIND>(q, scales, qt, scales_t, x, amax, n, c, wide != 0);                                                 \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS) hp_quantize_##name##_h(hp_byte *q, void *scales, hp_byte *qt,  \
      void *scales_t, const uint16_t *x, const float *amax, int64_t n, int64_t c, int64_t wide) {                      \
    quantize<KIND>(q, scales, qt, scales_t, x, amax, n, c, wide != 0);                                                 \
  }
ENTRIES(tensor, TENSOR)
ENTRIES(rows, ROWS)
ENTRIES(blocks, BLOCKS)
ENTRIES(mx, MX)
ENTRIES(nv, NV)
