/* attention.cu: causal attention with grouped queries, by blocks (Dao et al. 2022), for where no library is.
 *
 * n tokens = sequences of t, h query heads, k key/value heads (query head i reads key/value head i k/h), d head width.
 * qkv[n,(h+2k) d] = [q heads | k heads | v heads]   y[n,h d]   lse[n,h] (natural logarithm)
 *   fwd: S = q k^T / sqrt(d), causal;  P = exp(S - lse), lse = log sum exp S;  y = P v                  writes y, lse
 *   dx:  D = sum over d of dy y;  dP = dy v^T;  dS = P (dP - D);  dq = dS k / sqrt(d);
 *        dk = dS^T q / sqrt(d);  dv = P^T dy, both summed over the query heads of a group              writes dqkv
 * Moves q and y once and k, v once for each block of queries (fwd); dx takes three launches: D[n,h] into `work`, dq by
 * blocks of queries over the keys they see, dk and dv by blocks of keys over the heads of the group and the queries
 * that see them, in this order. Nobody adds to what another block writes, so there is one order of all sums. Blocks in
 * the masked half are not visited.
 * Two forms. In float32 arithmetic: any d up to 256, both compute types, tiles in shared memory. On the tensor cores:
 * bfloat16, d a multiple of 8 up to 128; P and dS are rounded to bfloat16 before they are multiplied.
 * The trick there: P and dS never leave the registers, since what a product yields lies as the next one wants its left
 * operand; for dk and dv the scores are made turned, keys by queries, so that this holds for P^T and dS^T.
 */
#include "device.cuh"

/* Rows of one head: `stride` elements from one token to the next, tokens of one sequence. */
template <typename A>
struct rows {
  A *x;
  int64_t stride;
};

/* One head of one sequence; dqkv is laid out as qkv, dy and lse as y. */
template <typename A>
struct head {
  rows<A> q, k, v;
};
template <typename A>
HP_FN head<A> head_of(A *qkv, int64_t t, int64_t h, int64_t k, int64_t d, int64_t sequence, int64_t query, int64_t kv) {
  const int64_t stride = (h + 2 * k) * d;
  A *const start = qkv + sequence * t * stride;
  return head<A>{{start + query * d, stride}, {start + (h + kv) * d, stride}, {start + (h + k + kv) * d, stride}};
}

HP_FN float scale_of(int64_t d) { return 1.0f / sqrtf((float)d); }

/* ---- in float32 arithmetic: 256 threads, 16 by 16 ---------------------------------------------------------------- */
enum { THREADS = 256, PAD = 4 };

/* Rows from `first` on, as floats, zeros beyond t tokens and d columns. */
template <int D, int B, typename A>
HP_FN void fetch(float (*to)[D + PAD], const rows<const A> &from, int64_t first, int64_t t, int64_t d) {
  const bool aligned = hp_rows_aligned(from.x, from.stride) && d % 4 == 0;
  for (int chunk = hp_thread(); chunk < B * D / 4; chunk += THREADS) {
    const int row = chunk / (D / 4), col = chunk % (D / 4) * 4;
    const A *at = from.x + (first + row) * from.stride + col;
    float v[4] = {0, 0, 0, 0};
    if (first + row < t && col < d) {
      if (aligned) hp_load(at, v);
      else hp_load_some(at, d - col, v);
    }
    hp_store(&to[row][col], v);
  }
}

template <typename A>
HP_FN void write(A *to, bool aligned, int64_t count, const float (&v)[4]) {
  if (count <= 0) return;
  if (aligned) hp_store(to, v);
  else hp_store_some(to, count, v);
}

/* s[i][j] = sum over d of a[ty + 16 i] b[tx + 16 j] */
template <int D, int R>
HP_FN void dots(float (&s)[R][R], float (*a)[D + PAD], float (*b)[D + PAD], int ty, int tx, int d) {
#pragma unroll
  for (int i = 0; i < R; i++) {
#pragma unroll
    for (int j = 0; j < R; j++) s[i][j] = 0;
  }
#pragma unroll 2
  for (int c = 0; c < d; c += 4) {
    float u[R][4], v[R][4];
#pragma unroll
    for (int i = 0; i < R; i++) hp_load(&a[ty + 16 * i][c], u[i]), hp_load(&b[tx + 16 * i][c], v[i]);
#pragma unroll
    for (int i = 0; i < R; i++) {
#pragma unroll
      for (int j = 0; j < R; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) s[i][j] += u[i][e] * v[j][e];
      }
    }
  }
}

/* out[i][64 g + 4 tx + e] += sum over m of p[ty + 16 i][m] x[m], or, turned, of p[m][ty + 16 i] x[m] */
template <int D, int B, bool TURNED>
HP_FN void mix(float (&out)[B / 16][D / 64][4], float (*p)[B + PAD], float (*x)[D + PAD], int ty, int tx) {
#pragma unroll 4
  for (int m = 0; m < B; m++) {
    float u[B / 16];
#pragma unroll
    for (int i = 0; i < B / 16; i++) u[i] = TURNED ? p[m][ty + 16 * i] : p[ty + 16 * i][m];
#pragma unroll
    for (int g = 0; g < D / 64; g++) {
      float v[4];
      hp_load(&x[m][64 * g + 4 * tx], v);
#pragma unroll
      for (int i = 0; i < B / 16; i++) {
#pragma unroll
        for (int e = 0; e < 4; e++) out[i][g][e] += u[i] * v[e];
      }
    }
  }
}

/* Over the 16 threads of a row. */
HP_FN float row_max(float v) {
#pragma unroll
  for (int step = 8; step > 0; step >>= 1) v = hp_max(v, __shfl_xor_sync(0xffffffffu, v, step));
  return v;
}
HP_FN float row_sum(float v) {
#pragma unroll
  for (int step = 8; step > 0; step >>= 1) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

template <int D, int B, typename A>
HP_FN void put(const rows<A> &to, const float (&out)[B / 16][D / 64][4], const float (&factor)[B / 16], int64_t first,
    int64_t t, int64_t d, int ty, int tx) {
  const bool aligned = hp_rows_aligned(to.x, to.stride) && d % 4 == 0;
#pragma unroll
  for (int i = 0; i < B / 16; i++) {
    const int64_t row = first + ty + 16 * i;
    if (row >= t) continue;
#pragma unroll
    for (int g = 0; g < D / 64; g++) {
      const int64_t col = 64 * g + 4 * tx;
      float v[4];
#pragma unroll
      for (int e = 0; e < 4; e++) v[e] = out[i][g][e] * factor[i];
      write(to.x + row * to.stride + col, aligned, d - col, v);
    }
  }
}

/* grid = (sequences h, blocks of queries): the last queries first, they have the most to do. */
template <int D, int B, typename A>
HP_FN void forward(A *y, float *lse, const A *qkv, int64_t t, int64_t h, int64_t k, int64_t d) {
  enum { R = B / 16 };
  HP_DYNAMIC_SHARED(float, room);
  float(*const q)[D + PAD] = reinterpret_cast<float(*)[D + PAD]>(room), (*const x)[D + PAD] = q + B;
  float(*const p)[B + PAD] = reinterpret_cast<float(*)[B + PAD]>(x + B);
  const int64_t sequence = blockIdx.x / h, query = blockIdx.x % h, first = (gridDim.y - 1 - blockIdx.y) * (int64_t)B;
  const head<const A> from = head_of(qkv, t, h, k, d, sequence, query, query / (h / k));
  const int ty = hp_thread() / 16, tx = hp_thread() % 16;
  const float scale = scale_of(d);
  float top[R], total[R] = {}, out[R][D / 64][4] = {}, s[R][R];
#pragma unroll
  for (int i = 0; i < R; i++) top[i] = -INFINITY;
  fetch<D, B>(q, from.q, first, t, d);
  for (int64_t key = 0; key <= first; key += B) {
    __syncthreads();
    fetch<D, B>(x, from.k, key, t, d);
    __syncthreads();
    dots<D, R>(s, q, x, ty, tx, (int)d);
#pragma unroll
    for (int i = 0; i < R; i++) {
      float most = -INFINITY, sum = 0;
#pragma unroll
      for (int j = 0; j < R; j++) {
        s[i][j] = key + tx + 16 * j > first + ty + 16 * i ? -INFINITY : s[i][j] * scale;
        most = hp_max(most, s[i][j]);
      }
      most = hp_max(top[i], row_max(most));
      const float factor = hp_exp(top[i] - most);
#pragma unroll
      for (int j = 0; j < R; j++) {
        s[i][j] = hp_exp(s[i][j] - most);
        sum += s[i][j];
        p[ty + 16 * i][tx + 16 * j] = s[i][j];
      }
      total[i] = total[i] * factor + row_sum(sum);
      top[i] = most;
#pragma unroll
      for (int g = 0; g < D / 64; g++) {
#pragma unroll
        for (int e = 0; e < 4; e++) out[i][g][e] *= factor;
      }
    }
    __syncthreads();
    fetch<D, B>(x, from.v, key, t, d);
    __syncthreads();
    mix<D, B, false>(out, p, x, ty, tx);
  }
#pragma unroll
  for (int i = 0; i < R; i++) {
    const int64_t row = first + ty + 16 * i;
    if (tx == 0 && row < t) lse[(sequence * t + row) * h + query] = top[i] + hp_log(total[i]);
    total[i] = 1.0f / total[i];
  }
  put<D, B>(rows<A>{y + sequence * t * h * d + query * d, h * d}, out, total, first, t, d, ty, tx);
}

/* D[n,h]: a warp for each token and head. */
template <typename A>
HP_FN void delta_of(const A *dy, const A *y, int64_t n, int64_t h, int64_t d, float *delta) {
  const int64_t at = (int64_t)blockIdx.x * (THREADS / 32) + hp_warp();
  if (at >= n * h) return;
  float sum = 0;
  for (int64_t c = hp_lane(); c < d; c += 32) sum += hp_get(dy[at * d + c]) * hp_get(y[at * d + c]);
  sum = hp_warp_sum(sum);
  if (hp_lane() == 0) delta[at] = sum;
}

/* s becomes P, dp becomes dS, for queries from `query` and keys from `key` on; nothing where there is no query. */
template <int R>
HP_FN void slopes(float (&s)[R][R], float (&dp)[R][R], const float (&lse)[R], const float (&delta)[R], int64_t query,
    int64_t key, int64_t t, float scale, int ty, int tx) {
#pragma unroll
  for (int i = 0; i < R; i++) {
    const int64_t row = query + ty + 16 * i;
#pragma unroll
    for (int j = 0; j < R; j++) {
      const bool seen = row < t && key + tx + 16 * j <= row;
      s[i][j] = seen ? hp_exp(s[i][j] * scale - lse[i]) : 0.0f;
      dp[i][j] = seen ? s[i][j] * (dp[i][j] - delta[i]) : 0.0f;
    }
  }
}

template <int R>
HP_FN void saved_of(float (&lse)[R], float (&delta)[R], const float *all_lse, const float *all_delta, int64_t first,
    int64_t t, int64_t h, int ty) {
#pragma unroll
  for (int i = 0; i < R; i++) {
    const int64_t row = first + ty + 16 * i;
    lse[i] = row < t ? all_lse[row * h] : 0.0f;
    delta[i] = row < t ? all_delta[row * h] : 0.0f;
  }
}

template <int B, int R>
HP_FN void keep(float (*to)[B + PAD], const float (&s)[R][R], int ty, int tx) {
#pragma unroll
  for (int i = 0; i < R; i++) {
#pragma unroll
    for (int j = 0; j < R; j++) to[ty + 16 * i][tx + 16 * j] = s[i][j];
  }
}

/* grid as in forward */
template <int D, int B, typename A>
HP_FN void queries_gradient(A *dqkv, const A *dy, const float *lse, const A *qkv, int64_t t, int64_t h, int64_t k,
    int64_t d, const float *delta) {
  enum { R = B / 16 };
  HP_DYNAMIC_SHARED(float, room);
  float(*const q)[D + PAD] = reinterpret_cast<float(*)[D + PAD]>(room), (*const up)[D + PAD] = q + B;
  float(*const x)[D + PAD] = up + B, (*const z)[D + PAD] = x + B;
  float(*const ds)[B + PAD] = reinterpret_cast<float(*)[B + PAD]>(z + B);
  const int64_t sequence = blockIdx.x / h, query = blockIdx.x % h, first = (gridDim.y - 1 - blockIdx.y) * (int64_t)B;
  const head<const A> from = head_of(qkv, t, h, k, d, sequence, query, query / (h / k));
  const head<A> to = head_of(dqkv, t, h, k, d, sequence, query, query / (h / k));
  const int64_t here = sequence * t * h + query;
  const int ty = hp_thread() / 16, tx = hp_thread() % 16;
  const float scale = scale_of(d);
  float s[R][R], dp[R][R], row_lse[R], row_delta[R], out[R][D / 64][4] = {}, factor[R];
  saved_of(row_lse, row_delta, lse + here, delta + here, first, t, h, ty);
  fetch<D, B>(q, from.q, first, t, d);
  fetch<D, B>(up, rows<const A>{dy + here * d, h * d}, first, t, d);
  for (int64_t key = 0; key <= first; key += B) {
    __syncthreads();
    fetch<D, B>(x, from.k, key, t, d);
    fetch<D, B>(z, from.v, key, t, d);
    __syncthreads();
    dots<D, R>(s, q, x, ty, tx, (int)d);
    dots<D, R>(dp, up, z, ty, tx, (int)d);
    slopes(s, dp, row_lse, row_delta, first, key, t, scale, ty, tx);
    keep<B>(ds, dp, ty, tx);
    __syncthreads();
    mix<D, B, false>(out, ds, x, ty, tx);
  }
#pragma unroll
  for (int i = 0; i < R; i++) factor[i] = scale;
  put<D, B>(to.q, out, factor, first, t, d, ty, tx);
}

/* grid = (sequences k, blocks of keys): the first keys are seen by the most queries. */
template <int D, int B, typename A>
HP_FN void keys_gradient(A *dqkv, const A *dy, const float *lse, const A *qkv, int64_t t, int64_t h, int64_t k,
    int64_t d, const float *delta) {
  enum { R = B / 16 };
  HP_DYNAMIC_SHARED(float, room);
  float(*const x)[D + PAD] = reinterpret_cast<float(*)[D + PAD]>(room), (*const z)[D + PAD] = x + B;
  float(*const q)[D + PAD] = z + B, (*const up)[D + PAD] = q + B;
  float(*const p)[B + PAD] = reinterpret_cast<float(*)[B + PAD]>(up + B);
  const int64_t sequence = blockIdx.x / k, kv = blockIdx.x % k, first = blockIdx.y * (int64_t)B, group = h / k;
  const int ty = hp_thread() / 16, tx = hp_thread() % 16;
  const float scale = scale_of(d);
  float s[R][R], dp[R][R], row_lse[R], row_delta[R], dk[R][D / 64][4] = {}, dv[R][D / 64][4] = {}, factor[R];
  const head<const A> keys = head_of(qkv, t, h, k, d, sequence, kv * group, kv);
  fetch<D, B>(x, keys.k, first, t, d);
  fetch<D, B>(z, keys.v, first, t, d);
  for (int64_t query = kv * group; query < (kv + 1) * group; query++) {
    const head<const A> from = head_of(qkv, t, h, k, d, sequence, query, kv);
    const int64_t here = sequence * t * h + query;
    for (int64_t row = first; row < t; row += B) {
      __syncthreads();
      fetch<D, B>(q, from.q, row, t, d);
      fetch<D, B>(up, rows<const A>{dy + here * d, h * d}, row, t, d);
      saved_of(row_lse, row_delta, lse + here, delta + here, row, t, h, ty);
      __syncthreads();
      dots<D, R>(s, q, x, ty, tx, (int)d);
      dots<D, R>(dp, up, z, ty, tx, (int)d);
      slopes(s, dp, row_lse, row_delta, row, first, t, scale, ty, tx);
      keep<B>(p, s, ty, tx);
      __syncthreads();
      mix<D, B, true>(dv, p, up, ty, tx);
      __syncthreads();
      keep<B>(p, dp, ty, tx);
      __syncthreads();
      mix<D, B, true>(dk, p, q, ty, tx);
    }
  }
  const head<A> to = head_of(dqkv, t, h, k, d, sequence, kv * group, kv);
#pragma unroll
  for (int i = 0; i < R; i++) factor[i] = scale;
  put<D, B>(to.k, dk, factor, first, t, d, ty, tx);
#pragma unroll
  for (int i = 0; i < R; i++) factor[i] = 1.0f;
  put<D, B>(to.v, dv, factor, first, t, d, ty, tx);
}

/* ---- on the tensor cores: 128 threads, each of 4 warps has 16 of the block's 64 rows ----------------------------- */
enum { WARPS = 4, TILE = 16 * WARPS };

/* Where 16 bytes (8 elements) of a tile lie: the eight rows that ldmatrix reads at once are in different banks. */
template <int D>
HP_FN int spot(int row, int chunk) {
  return row * D + (chunk ^ (row & 7)) * 8;
}

/* Starts copies of COUNT rows from `first` on, zeros beyond t tokens and d columns. */
template <int D, int COUNT>
HP_FN void request(uint16_t *to, const rows<const uint16_t> &from, int64_t first, int64_t t, int64_t d) {
#pragma unroll
  for (int i = 0; i < COUNT * D / 8 / (32 * WARPS); i++) {
    const int chunk = hp_thread() + i * 32 * WARPS, row = chunk / (D / 8), col = chunk % (D / 8);
    const bool there = first + row < t && 8 * col < d;
    hp_copy_async(to + spot<D>(row, col), there ? from.x + (first + row) * from.stride + 8 * col : from.x, there);
  }
}

/* The left operand: 16 rows of a tile, 16 of its columns. */
template <int D>
HP_FN void left_of(uint32_t (&v)[4], const uint16_t *tile, int row, int col) {
  hp_ldmatrix4(v, tile + spot<D>(row + (hp_lane() & 15), col / 8 ^ hp_lane() >> 4));
}
/* The right operand, twice eight columns of the product: 16 rows of a tile; or, across, 16 columns. */
template <int D, bool ACROSS>
HP_FN void right_of(uint32_t (&first)[2], uint32_t (&second)[2], const uint16_t *tile, int row, int col) {
  const int low = hp_lane() & 7, middle = hp_lane() >> 3 & 1, high = hp_lane() >> 4;
  uint32_t v[4];
  if (ACROSS) hp_ldmatrix4_transposed(v, tile + spot<D>(row + low + 8 * middle, col / 8 ^ high));
  else hp_ldmatrix4(v, tile + spot<D>(row + low + 8 * high, col / 8 ^ middle));
  first[0] = v[0], first[1] = v[1], second[0] = v[2], second[1] = v[3];
}

/* s[16, 8 N] = sum over d of rows of `a` from `row` on with rows of b */
template <int D, int N>
HP_FN void scores(float (&s)[N][4], const uint16_t *a, int row, const uint16_t *b) {
#pragma unroll
  for (int j = 0; j < N; j++) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0;
#pragma unroll 2
  for (int c = 0; c < D; c += 16) {
    uint32_t u[4];
    left_of<D>(u, a, row, c);
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      uint32_t first[2], second[2];
      right_of<D, false>(first, second, b, 8 * j, c);
      hp_mma_bfloat16(s[j], u, first);
      hp_mma_bfloat16(s[j + 1], u, second);
    }
  }
}

/* out[16, D] += p[16, 8 N] x[8 N, D], p as scores left it */
template <int D, int N>
HP_FN void gather(float (&out)[D / 8][4], const float (&p)[N][4], const uint16_t *x) {
#pragma unroll
  for (int m = 0; m < N; m += 2) {
    const uint32_t u[4] = {hp_bfloat16x2_of(p[m][0], p[m][1]), hp_bfloat16x2_of(p[m][2], p[m][3]),
        hp_bfloat16x2_of(p[m + 1][0], p[m + 1][1]), hp_bfloat16x2_of(p[m + 1][2], p[m + 1][3])};
#pragma unroll
    for (int j = 0; j < D / 8; j += 2) {
      uint32_t first[2], second[2];
      right_of<D, true>(first, second, x, 8 * m, 8 * j);
      hp_mma_bfloat16(out[j], u, first);
      hp_mma_bfloat16(out[j + 1], u, second);
    }
  }
}

/* The 16 rows of a warp, times a factor for each half of them, by way of its own rows of a tile that nobody needs. */
template <int D>
HP_FN void put(const rows<uint16_t> &to, const float (&out)[D / 8][4], float low, float high, uint16_t *tile,
    int64_t first, int64_t t, int64_t d) {
  const int row = 16 * hp_warp(), g = hp_lane() / 4, pair = hp_lane() % 4 * 2;
#pragma unroll
  for (int j = 0; j < D / 8; j++) {
    *reinterpret_cast<uint32_t *>(tile + spot<D>(row + g, j) + pair) =
        hp_bfloat16x2_of(out[j][0] * low, out[j][1] * low);
    *reinterpret_cast<uint32_t *>(tile + spot<D>(row + g + 8, j) + pair) =
        hp_bfloat16x2_of(out[j][2] * high, out[j][3] * high);
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 16 * D / 8 / 32; i++) {
    const int chunk = hp_lane() + 32 * i, line = row + chunk / (D / 8), col = chunk % (D / 8);
    if (first + line < t && 8 * col < d) {
      *reinterpret_cast<uint4 *>(to.x + (first + line) * to.stride + 8 * col) =
          *reinterpret_cast<const uint4 *>(tile + spot<D>(line, col));
    }
  }
}

/* Over the four lanes of a row. */
HP_FN float quad_max(float v) {
  v = hp_max(v, __shfl_xor_sync(0xffffffffu, v, 1));
  return hp_max(v, __shfl_xor_sync(0xffffffffu, v, 2));
}
HP_FN float quad_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

#define HP_LOG2_E 1.44269504088896341f

/* One half (rows g or g + 8) of a warp's scores becomes exp(score - maximum); what was summed before shrinks too. */
template <int D>
HP_FN void soften(float (&s)[TILE / 8][4], float (&out)[D / 8][4], float *top, float *total, float scale, int half) {
  float most = *top, sum = 0;
#pragma unroll
  for (int j = 0; j < TILE / 8; j++) most = hp_max(most, hp_max(s[j][2 * half], s[j][2 * half + 1]));
  most = quad_max(most);
  const float factor = hp_exp2((*top - most) * scale), offset = most * scale;
#pragma unroll
  for (int j = 0; j < TILE / 8; j++) {
#pragma unroll
    for (int e = 2 * half; e < 2 * half + 2; e++) {
      s[j][e] = hp_exp2(HP_FMA(s[j][e], scale, -offset));
      sum += s[j][e];
    }
  }
  *total = *total * factor + sum;
  *top = most;
#pragma unroll
  for (int j = 0; j < D / 8; j++) out[j][2 * half] *= factor, out[j][2 * half + 1] *= factor;
}

/* grid = (sequences h, blocks of queries), the last ones first */
template <int D>
HP_FN void tensor_forward(uint16_t *y, float *lse, const uint16_t *qkv, int64_t t, int64_t h, int64_t k, int64_t d) {
  enum { N = TILE / 8, SIZE = TILE * D };
  HP_DYNAMIC_SHARED(uint16_t, room);
  uint16_t *const q = room, *const x = q + SIZE; /* x: two stages of keys and values */
  const int64_t sequence = blockIdx.x / h, query = blockIdx.x % h, first = (gridDim.y - 1 - blockIdx.y) * (int64_t)TILE;
  const head<const uint16_t> from = head_of(qkv, t, h, k, d, sequence, query, query / (h / k));
  const int row = 16 * hp_warp(), g = hp_lane() / 4, pair = hp_lane() % 4 * 2;
  const float scale = scale_of(d), scale2 = scale * HP_LOG2_E;
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0}, out[D / 8][4] = {}, s[N][4];
  request<D, TILE>(q, from.q, first, t, d);
  request<D, TILE>(x, from.k, 0, t, d);
  request<D, TILE>(x + SIZE, from.v, 0, t, d);
  hp_copy_commit();
  int stage = 0;
  for (int64_t key = 0; key <= first; key += TILE) {
    uint16_t *const now = x + 2 * stage * SIZE, *const next = x + 2 * (stage ^ 1) * SIZE;
    if (key < first) {
      request<D, TILE>(next, from.k, key + TILE, t, d);
      request<D, TILE>(next + SIZE, from.v, key + TILE, t, d);
    }
    hp_copy_commit();
    hp_copy_wait<1>();
    __syncthreads();
    scores<D, N>(s, q, row, now);
    if (key == first) {
#pragma unroll
      for (int j = 0; j < N; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
          if (8 * j + pair + e % 2 > row + g + e / 2 * 8) s[j][e] = -INFINITY;
        }
      }
    }
    soften<D>(s, out, &top[0], &total[0], scale2, 0);
    soften<D>(s, out, &top[1], &total[1], scale2, 1);
    gather<D, N>(out, s, now + SIZE);
    __syncthreads();
    stage ^= 1;
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int64_t line = first + row + g + 8 * i;
    total[i] = quad_sum(total[i]);
    if (pair == 0 && line < t) lse[(sequence * t + line) * h + query] = top[i] * scale + hp_log(total[i]);
  }
  const rows<uint16_t> to = {y + (sequence * t * h + query) * d, h * d};
  put<D>(to, out, 1.0f / total[0], 1.0f / total[1], q, first, t, d);
}

/* grid as in tensor_forward */
template <int D>
HP_FN void tensor_queries_gradient(uint16_t *dqkv, const uint16_t *dy, const float *lse, const uint16_t *qkv, int64_t t,
    int64_t h, int64_t k, int64_t d, const float *delta) {
  enum { N = TILE / 8, SIZE = TILE * D };
  HP_DYNAMIC_SHARED(uint16_t, room);
  uint16_t *const q = room, *const up = q + SIZE, *const x = up + SIZE; /* x: two stages of keys and values */
  const int64_t sequence = blockIdx.x / h, query = blockIdx.x % h, first = (gridDim.y - 1 - blockIdx.y) * (int64_t)TILE;
  const head<const uint16_t> from = head_of(qkv, t, h, k, d, sequence, query, query / (h / k));
  const int64_t here = sequence * t * h + query;
  const int row = 16 * hp_warp(), g = hp_lane() / 4, pair = hp_lane() % 4 * 2;
  const float scale = scale_of(d), scale2 = scale * HP_LOG2_E;
  float row_lse[2], row_delta[2], out[D / 8][4] = {}, s[N][4], dp[N][4];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int64_t line = first + row + g + 8 * i;
    row_lse[i] = line < t ? lse[here + line * h] * HP_LOG2_E : 0.0f;
    row_delta[i] = line < t ? delta[here + line * h] : 0.0f;
  }
  request<D, TILE>(q, from.q, first, t, d);
  request<D, TILE>(up, rows<const uint16_t>{dy + here * d, h * d}, first, t, d);
  request<D, TILE>(x, from.k, 0, t, d);
  request<D, TILE>(x + SIZE, from.v, 0, t, d);
  hp_copy_commit();
  int stage = 0;
  for (int64_t key = 0; key <= first; key += TILE) {
    uint16_t *const now = x + 2 * stage * SIZE, *const next = x + 2 * (stage ^ 1) * SIZE;
    if (key < first) {
      request<D, TILE>(next, from.k, key + TILE, t, d);
      request<D, TILE>(next + SIZE, from.v, key + TILE, t, d);
    }
    hp_copy_commit();
    hp_copy_wait<1>();
    __syncthreads();
    scores<D, N>(s, q, row, now);
    scores<D, N>(dp, up, row, now + SIZE);
#pragma unroll
    for (int j = 0; j < N; j++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const bool seen = key < first || 8 * j + pair + e % 2 <= row + g + e / 2 * 8;
        const float p = hp_exp2(HP_FMA(s[j][e], scale2, -row_lse[e / 2]));
        dp[j][e] = seen ? p * (dp[j][e] - row_delta[e / 2]) : 0.0f;
      }
    }
    gather<D, N>(out, dp, now);
    __syncthreads();
    stage ^= 1;
  }
  const head<uint16_t> to = head_of(dqkv, t, h, k, d, sequence, query, query / (h / k));
  put<D>(to.q, out, scale, scale, q, first, t, d);
}

/* Queries of a stage, of which there are two: fewer where two results of 16 x 128 leave a warp no registers. */
template <int D>
struct stage_of {
  enum { queries = D == 64 ? 64 : 32 };
};

/* grid = (sequences k, blocks of keys). Scores lie turned, keys by queries, so that P^T and dS^T are left operands. */
template <int D>
HP_FN void tensor_keys_gradient(uint16_t *dqkv, const uint16_t *dy, const float *lse, const uint16_t *qkv, int64_t t,
    int64_t h, int64_t k, int64_t d, const float *delta) {
  enum { QUERIES = stage_of<D>::queries, N = QUERIES / 8, SIZE = TILE * D, STAGE = QUERIES * D };
  HP_DYNAMIC_SHARED(uint16_t, room);
  uint16_t *const x = room, *const z = x + SIZE, *const q = z + SIZE; /* q: two stages of queries and dy */
  float *const saved = reinterpret_cast<float *>(q + 4 * STAGE);      /* two stages of lse and D */
  const int64_t sequence = blockIdx.x / k, kv = blockIdx.x % k, first = blockIdx.y * (int64_t)TILE, group = h / k;
  const int64_t blocks = (t - first + QUERIES - 1) / QUERIES;
  const int row = 16 * hp_warp(), g = hp_lane() / 4, pair = hp_lane() % 4 * 2;
  const float scale = scale_of(d), scale2 = scale * HP_LOG2_E;
  float dk[D / 8][4] = {}, dv[D / 8][4] = {}, s[N][4], dp[N][4];
  const auto ask = [&](int64_t step, int stage) {
    const int64_t query = kv * group + step / blocks, at = first + step % blocks * QUERIES;
    const int64_t here = sequence * t * h + query, line = at + hp_thread();
    const head<const uint16_t> from = head_of(qkv, t, h, k, d, sequence, query, kv);
    request<D, QUERIES>(q + 2 * stage * STAGE, from.q, at, t, d);
    request<D, QUERIES>(q + (2 * stage + 1) * STAGE, rows<const uint16_t>{dy + here * d, h * d}, at, t, d);
    if (hp_thread() < QUERIES) {
      saved[2 * stage * QUERIES + hp_thread()] = line < t ? lse[here + line * h] * HP_LOG2_E : 0.0f;
      saved[(2 * stage + 1) * QUERIES + hp_thread()] = line < t ? delta[here + line * h] : 0.0f;
    }
  };
  const head<const uint16_t> keys = head_of(qkv, t, h, k, d, sequence, kv * group, kv);
  request<D, TILE>(x, keys.k, first, t, d);
  request<D, TILE>(z, keys.v, first, t, d);
  ask(0, 0);
  hp_copy_commit();
  int stage = 0;
  for (int64_t step = 0; step < group * blocks; step++) {
    if (step + 1 < group * blocks) ask(step + 1, stage ^ 1);
    hp_copy_commit();
    hp_copy_wait<1>();
    __syncthreads();
    const uint16_t *const now = q + 2 * stage * STAGE, *const up = now + STAGE;
    const float *const row_lse = saved + 2 * stage * QUERIES, *const row_delta = row_lse + QUERIES;
    const int ahead = step % blocks * QUERIES < TILE ? (int)(step % blocks) * QUERIES : TILE; /* of the first query */
    scores<D, N>(s, x, row, now);
    scores<D, N>(dp, z, row, up);
#pragma unroll
    for (int j = 0; j < N; j++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int column = 8 * j + pair + e % 2;
        const bool seen = row + g + e / 2 * 8 <= ahead + column;
        s[j][e] = seen ? hp_exp2(HP_FMA(s[j][e], scale2, -row_lse[column])) : 0.0f;
        dp[j][e] = seen ? s[j][e] * (dp[j][e] - row_delta[column]) : 0.0f;
      }
    }
    gather<D, N>(dv, s, up);
    gather<D, N>(dk, dp, now);
    __syncthreads();
    stage ^= 1;
  }
  const head<uint16_t> to = head_of(dqkv, t, h, k, d, sequence, kv * group, kv);
  put<D>(to.k, dk, scale, scale, x, first, t, d);
  put<D>(to.v, dv, 1.0f, 1.0f, z, first, t, d);
}

/* ---- entries ----------------------------------------------------------------------------------------------------- */
extern "C" __global__ void __launch_bounds__(THREADS, 1) hp_attention_dx_delta(const float *dy, const float *y,
    int64_t n, int64_t h, int64_t d, void *work) {
  delta_of(dy, y, n, h, d, (float *)work);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) hp_attention_dx_delta_h(const uint16_t *dy, const uint16_t *y,
    int64_t n, int64_t h, int64_t d, void *work) {
  delta_of(dy, y, n, h, d, (float *)work);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) hp_attention_fwd_64(float *y, float *lse, const float *qkv,
    int64_t t, int64_t h, int64_t k, int64_t d) {
  forward<64, 64>(y, lse, qkv, t, h, k, d);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) hp_attention_fwd_128(float *y, float *lse, const float *qkv,
    int64_t t, int64_t h, int64_t k, int64_t d) {
  forward<128, 64>(y, lse, qkv, t, h, k, d);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) hp_attention_fwd_256(float *y, float *lse, const float *qkv,
    int64_t t, int64_t h, int64_t k, int64_t d) {
  forward<256, 32>(y, lse, qkv, t, h, k, d);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) hp_attention_fwd_64_h(uint16_t *y, float *lse,
    const uint16_t *qkv, int64_t t, int64_t h, int64_t k, int64_t d) {
  forward<64, 64>(y, lse, qkv, t, h, k, d);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) hp_attention_fwd_128_h(uint16_t *y, float *lse,
    const uint16_t *qkv, int64_t t, int64_t h, int64_t k, int64_t d) {
  forward<128, 64>(y, lse, qkv, t, h, k, d);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) hp_attention_fwd_256_h(uint16_t *y, float *lse,
    const uint16_t *qkv, int64_t t, int64_t h, int64_t k, int64_t d) {
  forward<256, 32>(y, lse, qkv, t, h, k, d);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) hp_attention_dx_queries_64(float *dqkv, const float *dy,
    const float *lse, const float *qkv, int64_t t, int64_t h, int64_t k, int64_t d, void *work) {
  queries_gradient<64, 64>(dqkv, dy, lse, qkv, t, h, k, d, (const float *)work);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) hp_attention_dx_queries_128(float *dqkv, const float *dy,
    const float *lse, const float *qkv, int64_t t, int64_t h, int64_t k, int64_t d, void *work) {
  queries_gradient<128, 32>(dqkv, dy, lse, qkv, t, h, k, d, (const float *)work);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) hp_attention_dx_queries_256(float *dqkv, const float *dy,
    const float *lse, const float *qkv, int64_t t, int64_t h, int64_t k, int64_t d, void *work) {
  queries_gradient<256, 16>(dqkv, dy, lse, qkv, t, h, k, d, (const float *)work);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) hp_attention_dx_queries_64_h(uint16_t *dqkv,
    const uint16_t *dy, const float *lse, const uint16_t *qkv, int64_t t, int64_t h, int64_t k, int64_t d, void *work) {
  queries_gradient<64, 64>(dqkv, dy, lse, qkv, t, h, k, d, (const float *)work);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) hp_attention_dx_queries_128_h(uint16_t *dqkv,
    const uint16_t *dy, const float *lse, const uint16_t *qkv, int64_t t, int64_t h, int64_t k, int64_t d, void *work) {
  queries_gradient<128, 32>(dqkv, dy, lse, qkv, t, h, k, d, (const float *)work);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) hp_attention_dx_queries_256_h(uint16_t *dqkv,
    const uint16_t *dy, const float *lse, const uint16_t *qkv, int64_t t, int64_t h, int64_t k, int64_t d, void *work) {
  queries_gradient<256, 16>(dqkv, dy, lse, qkv, t, h, k, d, (const float *)work);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) hp_attention_dx_keys_64(float *dqkv, const float *dy,
    const float *lse, const float *qkv, int64_t t, int64_t h, int64_t k, int64_t d, void *work) {
  keys_gradient<64, 64>(dqkv, dy, lse, qkv, t, h, k, d, (const float *)work);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) hp_attention_dx_keys_128(float *dqkv, const float *dy,
    const float *lse, const float *qkv, int64_t t, int64_t h, int64_t k, int64_t d, void *work) {
  keys_gradient<128, 32>(dqkv, dy, lse, qkv, t, h, k, d, (const float *)work);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) hp_attention_dx_keys_256(float *dqkv, const float *dy,
    const float *lse, const float *qkv, int64_t t, int64_t h, int64_t k, int64_t d, void *work) {
  keys_gradient<256, 16>(dqkv, dy, lse, qkv, t, h, k, d, (const float *)work);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) hp_attention_dx_keys_64_h(uint16_t *dqkv, const uint16_t *dy,
    const float *lse, const uint16_t *qkv, int64_t t, int64_t h, int64_t k, int64_t d, void *work) {
  keys_gradient<64, 64>(dqkv, dy, lse, qkv, t, h, k, d, (const float *)work);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) hp_attention_dx_keys_128_h(uint16_t *dqkv, const uint16_t *dy,
    const float *lse, const uint16_t *qkv, int64_t t, int64_t h, int64_t k, int64_t d, void *work) {
  keys_gradient<128, 32>(dqkv, dy, lse, qkv, t, h, k, d, (const float *)work);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) hp_attention_dx_keys_256_h(uint16_t *dqkv, const uint16_t *dy,
    const float *lse, const uint16_t *qkv, int64_t t, int64_t h, int64_t k, int64_t d, void *work) {
  keys_gradient<256, 16>(dqkv, dy, lse, qkv, t, h, k, d, (const float *)work);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) hp_attention_fwd_tensor_64_h(uint16_t *y, float *lse,
    const uint16_t *qkv, int64_t t, int64_t h, int64_t k, int64_t d) {
  tensor_forward<64>(y, lse, qkv, t, h, k, d);
}
extern "C" __global__ void __launch_bounds__(32 * WARPS) hp_attention_dx_queries_tensor_64_h(uint16_t *dqkv,
    const uint16_t *dy, const float *lse, const uint16_t *qkv, int64_t t, int64_t h, int64_t k, int64_t d, void *work) {
  tensor_queries_gradient<64>(dqkv, dy, lse, qkv, t, h, k, d, (const float *)work);
}
extern "C" __global__ void __launch_bounds__(32 * WARPS) hp_attention_dx_keys_tensor_64_h(uint16_t *dqkv,
    const uint16_t *dy, const float *lse, const uint16_t *qkv, int64_t t, int64_t h, int64_t k, int64_t d, void *work) {
  tensor_keys_gradient<64>(dqkv, dy, lse, qkv, t, h, k, d, (const float *)work);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) hp_attention_fwd_tensor_128_h(uint16_t *y, float *lse,
    const uint16_t *qkv, int64_t t, int64_t h, int64_t k, int64_t d) {
  tensor_forward<128>(y, lse, qkv, t, h, k, d);
}
extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) hp_attention_dx_queries_tensor_128_h(uint16_t *dqkv,
    const uint16_t *dy, const float *lse, const uint16_t *qkv, int64_t t, int64_t h, int64_t k, int64_t d, void *work) {
  tensor_queries_gradient<128>(dqkv, dy, lse, qkv, t, h, k, d, (const float *)work);
}
extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) hp_attention_dx_keys_tensor_128_h(uint16_t *dqkv,
    const uint16_t *dy, const float *lse, const uint16_t *qkv, int64_t t, int64_t h, int64_t k, int64_t d, void *work) {
  tensor_keys_gradient<128>(dqkv, dy, lse, qkv, t, h, k, d, (const float *)work);
}
