/* linear.cu: the three passes of y = x w^T + b + z, for where no library is: twin of cpu/linear.c.
 *
 * n tokens, c channels in, o channels out.   x[n,c]  w[o,c]  b[o]  y, z[n,o]
 *   fwd: y  = x w^T + b + z      writes y; b, and z, what comes around the layer, may be absent
 *   dx:  dx = dy w               writes dx
 *   dw:  dw += dy^T x, db += sum over n of dy     accumulates into dw, db, which are float32
 * Moves each operand once for every tile of the result in its direction (TILE = 128, or 64 where 128 leaves processors
 * idle), the result once (dw twice). A sum runs over the depth from its start to its end, in one thread (float32) or in
 * sixteens through the tensor cores (bfloat16), for either tile: the bits depend on nothing but the operands.
 * The trick: one kernel for three passes, which differ in how the operands lie: along (rows of depth) or across (rows
 * are steps of the depth). float32 goes through registers into panels that lie across and uses no tensor cores: TF32
 * is not float32; bfloat16 is copied behind the computation's back and turned by ldmatrix.
 * Column sums go by slabs of 256 rows through work[ceil(n/256), o], then over the slabs in their order.
 */
#include "device.cuh"

enum { THREADS = 256, SLAB = 256 };

/* An operand or a result: rows of `cols` elements without gaps. */
template <typename A>
struct matrix {
  A *x;
  int64_t rows, cols;
};

/* What becomes of a sum: y = sum + b[column] + z; z may be y itself. */
template <typename A>
struct outcome {
  A *y;
  const A *b, *z;
  int64_t rows, cols;
};

/* Four neighbours of a row. */
template <typename A>
HP_FN void finish(const outcome<A> &to, bool aligned, int64_t i, int64_t j, float (&v)[4]) {
  if (i >= to.rows || j >= to.cols) return;
  const int64_t at = i * to.cols + j, count = to.cols - j;
  float start[4];
  if (to.b) {
    hp_load_some(to.b + j, count, start);
#pragma unroll
    for (int e = 0; e < 4; e++) v[e] += start[e];
  }
  if (to.z) {
    if (aligned) hp_load(to.z + at, start);
    else hp_load_some(to.z + at, count, start);
#pragma unroll
    for (int e = 0; e < 4; e++) v[e] += start[e];
  }
  if (aligned) hp_store(to.y + at, v);
  else hp_store_some(to.y + at, count, v);
}

/* ---- float32 ----------------------------------------------------------------------------------------------------- */
enum { PAD = 4 };
/* Depth of a panel: what leaves a thread the registers for its sums. */
template <int TILE>
struct deep {
  enum { depth = TILE == 128 ? 8 : 16 };
};

/* A thread's part of the panel of TILE from `first` on, of the depth from `depth` on; zeros beyond the matrix. */
template <int TILE, bool ACROSS, int COUNT>
HP_FN void fetch(float (&v)[COUNT][4], const matrix<const float> &a, bool aligned, int64_t first, int64_t depth) {
  const int width = (ACROSS ? TILE : deep<TILE>::depth) / 4;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    const int chunk = hp_thread() + i * THREADS;
    const int64_t row = (ACROSS ? depth : first) + chunk / width, col = (ACROSS ? first : depth) + chunk % width * 4;
    const float *from = a.x + row * a.cols + col;
    if (row >= a.rows || col >= a.cols) v[i][0] = v[i][1] = v[i][2] = v[i][3] = 0;
    else if (aligned) hp_load(from, v[i]);
    else hp_load_some(from, a.cols - col, v[i]);
  }
}

template <int TILE, bool ACROSS, int COUNT>
HP_FN void place(float (*to)[TILE + PAD], const float (&v)[COUNT][4]) {
  const int width = (ACROSS ? TILE : deep<TILE>::depth) / 4;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    const int chunk = hp_thread() + i * THREADS, row = chunk / width, col = chunk % width * 4;
    if (ACROSS) {
      hp_store(&to[row][col], v[i]);
    } else {
#pragma unroll
      for (int e = 0; e < 4; e++) to[col + e][row] = v[i][e];
    }
  }
}

/* y[rows, cols] = sum over depth; a is [rows, depth], or [depth, rows] across, b [cols, depth], or [depth, cols]. */
template <int TILE, bool A_ACROSS, bool B_ACROSS>
HP_FN void product(const outcome<float> &to, const matrix<const float> &a, const matrix<const float> &b) {
  enum { DEPTH = deep<TILE>::depth, COUNT = TILE * DEPTH / 4 / THREADS, GROUPS = TILE / 64 };
  __shared__ __align__(16) float left[2][DEPTH][TILE + PAD], right[2][DEPTH][TILE + PAD];
  const int64_t i0 = (int64_t)blockIdx.x * TILE, j0 = (int64_t)blockIdx.y * TILE, depth = A_ACROSS ? a.rows : a.cols;
  const bool a_aligned = hp_rows_aligned(a.x, a.cols), b_aligned = hp_rows_aligned(b.x, b.cols);
  const int ty = hp_thread() / 16 * 4, tx = hp_thread() % 16 * 4;
  float sum[4 * GROUPS][4 * GROUPS] = {}, next_a[COUNT][4], next_b[COUNT][4];
  fetch<TILE, A_ACROSS>(next_a, a, a_aligned, i0, 0);
  fetch<TILE, B_ACROSS>(next_b, b, b_aligned, j0, 0);
  for (int64_t k = 0, side = 0; k < depth; k += DEPTH, side ^= 1) {
    place<TILE, A_ACROSS>(left[side], next_a);
    place<TILE, B_ACROSS>(right[side], next_b);
    __syncthreads();
    if (k + DEPTH < depth) {
      fetch<TILE, A_ACROSS>(next_a, a, a_aligned, i0, k + DEPTH);
      fetch<TILE, B_ACROSS>(next_b, b, b_aligned, j0, k + DEPTH);
    }
#pragma unroll 2
    for (int step = 0; step < DEPTH; step++) {
      float u[GROUPS][4], v[GROUPS][4];
#pragma unroll
      for (int g = 0; g < GROUPS; g++) {
        hp_load(&left[side][step][64 * g + ty], u[g]);
        hp_load(&right[side][step][64 * g + tx], v[g]);
      }
#pragma unroll
      for (int i = 0; i < 4 * GROUPS; i++) {
#pragma unroll
        for (int j = 0; j < 4 * GROUPS; j++) sum[i][j] += u[i / 4][i % 4] * v[j / 4][j % 4];
      }
    }
  }
  const bool aligned = to.cols % 4 == 0 && hp_rows_aligned(to.y, to.cols) && hp_rows_aligned(to.z, to.cols);
#pragma unroll
  for (int i = 0; i < 4 * GROUPS; i++) {
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
      float v[4] = {sum[i][4 * g], sum[i][4 * g + 1], sum[i][4 * g + 2], sum[i][4 * g + 3]};
      finish(to, aligned, i0 + i / 4 * 64 + ty + i % 4, j0 + 64 * g + tx, v);
    }
  }
}

/* ---- bfloat16 ---------------------------------------------------------------------------------------------------- */
enum { SPAN = 32, STAGES = 3 }; /* depth of a stage; stages in flight */

/* Where 16 bytes (8 elements) of a panel lie, in elements. Along: TILE rows of 4 chunks; across: SPAN rows of TILE / 8.
 * Chunks change places by their row, so that the eight rows that ldmatrix reads at once lie in different banks. */
template <int TILE, bool ACROSS>
HP_FN int spot(int row, int chunk) {
  return ACROSS ? row * TILE + (chunk ^ (row & 7)) * 8 : row * SPAN + (chunk ^ (row >> 1 & 3)) * 8;
}

/* Starts the copies of a panel; what is not aligned goes through registers, and is there after the same barrier. */
template <int TILE, bool ACROSS>
HP_FN void request(uint16_t *to, const matrix<const uint16_t> &a, bool aligned, int64_t first, int64_t depth) {
  const int width = (ACROSS ? TILE : SPAN) / 8;
#pragma unroll
  for (int i = 0; i < TILE * SPAN / 8 / THREADS; i++) {
    const int chunk = hp_thread() + i * THREADS;
    const int64_t row = (ACROSS ? depth : first) + chunk / width, col = (ACROSS ? first : depth) + chunk % width * 8;
    uint16_t *const at = to + spot<TILE, ACROSS>(chunk / width, chunk % width);
    const bool there = row < a.rows && col < a.cols;
    const uint16_t *from = there ? a.x + row * a.cols + col : a.x;
    if (aligned) {
      hp_copy_async(at, from, there);
    } else {
      float v[8];
      hp_load_some(from, there ? a.cols - col : 0, v);
      hp_store(at, v);
    }
  }
}

/* Fragments of 16 rows of a and 16 steps of depth. */
template <int TILE, bool ACROSS>
HP_FN void left_of(uint32_t (&v)[4], const uint16_t *panel, int first, int step) {
  const int lane = hp_lane(), low = lane & 7, second = lane >> 3 & 1, third = lane >> 4;
  if (ACROSS) hp_ldmatrix4_transposed(v, panel + spot<TILE, true>(step + low + 8 * third, first / 8 + second));
  else hp_ldmatrix4(v, panel + spot<TILE, false>(first + low + 8 * second, step / 8 + third));
}

/* Fragments of 16 columns of b, two times eight, and 16 steps of depth. */
template <int TILE, bool ACROSS>
HP_FN void right_of(uint32_t (&v)[2][2], const uint16_t *panel, int first, int step) {
  const int lane = hp_lane(), low = lane & 7, second = lane >> 3 & 1, third = lane >> 4;
  uint32_t all[4];
  if (ACROSS) hp_ldmatrix4_transposed(all, panel + spot<TILE, true>(step + low + 8 * second, first / 8 + third));
  else hp_ldmatrix4(all, panel + spot<TILE, false>(first + low + 8 * third, step / 8 + second));
  v[0][0] = all[0], v[0][1] = all[1], v[1][0] = all[2], v[1][1] = all[3];
}

/* Eight warps, two by four; each has TILE/2 x TILE/4 of the tile. */
template <int TILE, bool A_ACROSS, bool B_ACROSS, typename R>
HP_FN void product(const outcome<R> &to, const matrix<const uint16_t> &a, const matrix<const uint16_t> &b) {
  enum { ROWS = TILE / 2, COLS = TILE / 4, PANEL = TILE * SPAN };
  HP_DYNAMIC_SHARED(uint16_t, panels); /* [STAGES][a, b][PANEL] */
  const int64_t i0 = (int64_t)blockIdx.x * TILE, j0 = (int64_t)blockIdx.y * TILE, depth = A_ACROSS ? a.rows : a.cols;
  const bool a_aligned = hp_rows_aligned(a.x, a.cols), b_aligned = hp_rows_aligned(b.x, b.cols);
  const int lane = hp_lane(), row = hp_warp() / 4 * ROWS, col = hp_warp() % 4 * COLS;
  float sum[ROWS / 16][COLS / 8][4] = {};
  for (int s = 0; s < STAGES - 1; s++) {
    if (s * SPAN < depth) {
      request<TILE, A_ACROSS>(panels + 2 * s * PANEL, a, a_aligned, i0, s * SPAN);
      request<TILE, B_ACROSS>(panels + (2 * s + 1) * PANEL, b, b_aligned, j0, s * SPAN);
    }
    hp_copy_commit();
  }
  int stage = 0, ahead = STAGES - 1;
  for (int64_t k = 0; k < depth; k += SPAN) {
    hp_copy_wait<STAGES - 2>();
    __syncthreads();
    const int64_t later = k + (STAGES - 1) * SPAN;
    if (later < depth) {
      request<TILE, A_ACROSS>(panels + 2 * ahead * PANEL, a, a_aligned, i0, later);
      request<TILE, B_ACROSS>(panels + (2 * ahead + 1) * PANEL, b, b_aligned, j0, later);
    }
    hp_copy_commit();
#pragma unroll
    for (int step = 0; step < SPAN; step += 16) {
      uint32_t u[ROWS / 16][4], v[COLS / 8][2];
#pragma unroll
      for (int i = 0; i < ROWS / 16; i++) left_of<TILE, A_ACROSS>(u[i], panels + 2 * stage * PANEL, row + 16 * i, step);
#pragma unroll
      for (int j = 0; j < COLS / 8; j += 2) {
        uint32_t pair[2][2];
        right_of<TILE, B_ACROSS>(pair, panels + (2 * stage + 1) * PANEL, col + 8 * j, step);
        v[j][0] = pair[0][0], v[j][1] = pair[0][1], v[j + 1][0] = pair[1][0], v[j + 1][1] = pair[1][1];
      }
#pragma unroll
      for (int i = 0; i < ROWS / 16; i++) {
#pragma unroll
        for (int j = 0; j < COLS / 8; j++) hp_mma_bfloat16(sum[i][j], u[i], v[j]);
      }
    }
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    ahead = ahead + 1 == STAGES ? 0 : ahead + 1;
  }
  /* Two lanes that are neighbours have two columns of two rows each; after an exchange, four columns of a row each. */
  const bool aligned = to.cols % 4 == 0 && hp_rows_aligned(to.y, 8) && hp_rows_aligned(to.z, 8);
  const bool odd = lane & 1;
#pragma unroll
  for (int i = 0; i < ROWS / 16; i++) {
#pragma unroll
    for (int j = 0; j < COLS / 8; j++) {
      const float(&s)[4] = sum[i][j];
      const float first = __shfl_xor_sync(0xffffffffu, odd ? s[0] : s[2], 1);
      const float second = __shfl_xor_sync(0xffffffffu, odd ? s[1] : s[3], 1);
      float v[4] = {odd ? first : s[0], odd ? second : s[1], odd ? s[2] : first, odd ? s[3] : second};
      finish(to, aligned, i0 + row + 16 * i + lane / 4 + (odd ? 8 : 0), j0 + col + 8 * j + (lane & 2) * 2, v);
    }
  }
}

/* ---- the passes -------------------------------------------------------------------------------------------------- */
template <int TILE, typename A>
HP_FN void forward(A *y, const A *x, const A *w, const A *b, const A *z, int64_t n, int64_t o, int64_t c) {
  product<TILE, false, false>(outcome<A>{y, b, z, n, o}, matrix<const A>{x, n, c}, matrix<const A>{w, o, c});
}
template <int TILE, typename A>
HP_FN void input_gradient(A *dx, const A *dy, const A *w, int64_t n, int64_t o, int64_t c) {
  product<TILE, false, true>(outcome<A>{dx, 0, 0, n, c}, matrix<const A>{dy, n, o}, matrix<const A>{w, o, c});
}
template <int TILE, typename A>
HP_FN void weight_gradient(float *dw, const A *dy, const A *x, int64_t n, int64_t o, int64_t c) {
  product<TILE, true, true>(outcome<float>{dw, 0, dw, o, c}, matrix<const A>{dy, n, o}, matrix<const A>{x, n, c});
}

/* Column sums of a slab of rows: 8 threads side by side have 16 bytes of a row each, 32 rows at a time. */
template <typename A>
HP_FN void slab_sums(const A *dy, int64_t n, int64_t o, float *slabs) {
  enum { N = hp_vector<A>::size, WIDTH = 8 * N };
  __shared__ float room[32][WIDTH];
  const int lane = hp_thread() % 8, line = hp_thread() / 8;
  const int64_t j0 = (int64_t)blockIdx.x * WIDTH, j = j0 + lane * N, i0 = (int64_t)blockIdx.y * SLAB;
  const bool aligned = hp_rows_aligned(dy, o);
  float sum[N] = {}, v[N];
  for (int64_t i = i0 + line; i < i0 + SLAB && i < n && j < o; i += 32) {
    if (aligned) hp_load(dy + i * o + j, v);
    else hp_load_some(dy + i * o + j, o - j, v);
#pragma unroll
    for (int e = 0; e < N; e++) sum[e] += v[e];
  }
#pragma unroll
  for (int e = 0; e < N; e++) room[line][lane * N + e] = sum[e];
  __syncthreads();
  if (hp_thread() >= WIDTH || j0 + hp_thread() >= o) return;
  float total = 0;
#pragma unroll 8
  for (int i = 0; i < 32; i++) total += room[i][hp_thread()];
  slabs[(int64_t)blockIdx.y * o + j0 + hp_thread()] = total;
}

extern "C" __global__ void __launch_bounds__(THREADS) hp_linear_dw_slabs(const float *dy, int64_t n, int64_t o,
    void *work) {
  slab_sums(dy, n, o, (float *)work);
}
extern "C" __global__ void __launch_bounds__(THREADS) hp_linear_dw_slabs_h(const uint16_t *dy, int64_t n, int64_t o,
    void *work) {
  slab_sums(dy, n, o, (float *)work);
}
/* db += the slabs, in their order. */
extern "C" __global__ void __launch_bounds__(THREADS) hp_linear_dw_bias(float *db, int64_t n, int64_t o, void *work) {
  const int64_t j = (int64_t)blockIdx.x * THREADS + hp_thread();
  if (j >= o) return;
  float total = 0;
  for (int64_t s = 0; s < (n + SLAB - 1) / SLAB; s++) total += ((const float *)work)[s * o + j];
  db[j] += total;
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) hp_linear_fwd(float *y, const float *x, const float *w,
    const float *b, const float *z, int64_t n, int64_t o, int64_t c) {
  forward<128>(y, x, w, b, z, n, o, c);
}
extern "C" __global__ void __launch_bounds__(THREADS) hp_linear_fwd_small(float *y, const float *x, const float *w,
    const float *b, const float *z, int64_t n, int64_t o, int64_t c) {
  forward<64>(y, x, w, b, z, n, o, c);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) hp_linear_fwd_h(uint16_t *y, const uint16_t *x,
    const uint16_t *w, const uint16_t *b, const uint16_t *z, int64_t n, int64_t o, int64_t c) {
  forward<128>(y, x, w, b, z, n, o, c);
}
extern "C" __global__ void __launch_bounds__(THREADS) hp_linear_fwd_small_h(uint16_t *y, const uint16_t *x,
    const uint16_t *w, const uint16_t *b, const uint16_t *z, int64_t n, int64_t o, int64_t c) {
  forward<64>(y, x, w, b, z, n, o, c);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) hp_linear_dx(float *dx, const float *dy, const float *w,
    int64_t n, int64_t o, int64_t c) {
  input_gradient<128>(dx, dy, w, n, o, c);
}
extern "C" __global__ void __launch_bounds__(THREADS) hp_linear_dx_small(float *dx, const float *dy, const float *w,
    int64_t n, int64_t o, int64_t c) {
  input_gradient<64>(dx, dy, w, n, o, c);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) hp_linear_dx_h(uint16_t *dx, const uint16_t *dy,
    const uint16_t *w, int64_t n, int64_t o, int64_t c) {
  input_gradient<128>(dx, dy, w, n, o, c);
}
extern "C" __global__ void __launch_bounds__(THREADS) hp_linear_dx_small_h(uint16_t *dx, const uint16_t *dy,
    const uint16_t *w, int64_t n, int64_t o, int64_t c) {
  input_gradient<64>(dx, dy, w, n, o, c);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) hp_linear_dw(float *dw, const float *dy, const float *x,
    int64_t n, int64_t o, int64_t c) {
  weight_gradient<128>(dw, dy, x, n, o, c);
}
extern "C" __global__ void __launch_bounds__(THREADS) hp_linear_dw_small(float *dw, const float *dy, const float *x,
    int64_t n, int64_t o, int64_t c) {
  weight_gradient<64>(dw, dy, x, n, o, c);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) hp_linear_dw_h(float *dw, const uint16_t *dy,
    const uint16_t *x, int64_t n, int64_t o, int64_t c) {
  weight_gradient<128>(dw, dy, x, n, o, c);
}
extern "C" __global__ void __launch_bounds__(THREADS) hp_linear_dw_small_h(float *dw, const uint16_t *dy,
    const uint16_t *x, int64_t n, int64_t o, int64_t c) {
  weight_gradient<64>(dw, dy, x, n, o, c);
}
