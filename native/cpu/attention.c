/* attention.c: causal attention with grouped queries, by blocks of 64 query rows (after Dao et al. 2022).
 *
 * n tokens = sequences of t, h query heads, k key/value heads (query head i reads key/value head i k/h), d head width.
 * qkv[n,(h+2k) d] = [q heads | k heads | v heads]   y[n,h d]   lse[n,h]
 *   fwd: S = q k^T / sqrt(d), causal;  P = exp(S - lse), lse = log sum exp S;  y = P v                  writes y, lse
 *   dx:  D = sum over d of dy y;  dP = dy v^T;  dS = P (dP - D);  dq = dS k / sqrt(d);
 *        dk = dS^T q / sqrt(d);  dv = P^T dy, both summed over the query heads of a group              writes dqkv
 * Moves 4 n (h + 2k) d bytes in and 4 n h d out (fwd), about three times that (dx); the t x t matrix never exists: a
 * thread holds one (fwd) or two (dx) blocks of 64 x t in `work`, and keys after the last query of a block are not
 * touched.
 * The trick: dx takes the query blocks from the last to the first. The last block reaches every key, so it writes dk
 * and dv and all others add to them: no clearing, and one fixed order, since one thread owns a key/value head.
 */
#include "team.h"

#define HP_QUERIES 64
/* Row stride of a block of scores: not a power of two, whose rows would share a few cache sets. The table's expression
 * for `work` is two such blocks. */
#define HP_STRIDE(t) ((t) + 32)
/* Rows of scores are worked on in whole vectors: up to 15 numbers beyond `end`, which no product reads. */
#define HP_WHOLE(end) (((end) + 15) / 16 * 16)

/* One head of one sequence, and the block of its queries [first, first + rows), which see keys [0, end). */
typedef struct {
  const float *q, *k, *v; /* their first rows in qkv, `stride` numbers from one token to the next */
  int64_t stride, d, first, rows, end;
  float scale;
} block;

static block block_of(const float *qkv, int64_t t, int64_t h, int64_t k, int64_t d, int64_t sequence, int64_t head) {
  const int64_t stride = (h + 2 * k) * d, kv = head / (h / k);
  const float *start = qkv + sequence * t * stride;
  return (block){start + head * d, start + (h + kv) * d, start + (h + k + kv) * d, stride, d, 0, 0, 0,
      (float)(1.0 / sqrt((double)d))};
}

static void place(block *b, int64_t first, int64_t t) {
  b->first = first;
  b->rows = HP_MIN(HP_QUERIES, t - first);
  b->end = first + b->rows;
}

static float *scratch(void *work, int64_t t) {
  return (float *)work + omp_get_thread_num() * 2 * HP_QUERIES * HP_STRIDE(t);
}

/* s[rows, end] = q k^T / sqrt(d) */
static void scores(float *s, int64_t width, const block *b) {
  hp_sgemm(CblasNoTrans, CblasTrans, b->rows, b->end, b->d, b->scale, b->q + b->first * b->stride, b->stride, b->k,
      b->stride, 0, s, width);
}

/* Scores of one row become exp(score - max), zero beyond its `seen` keys; returns their sum, and the maximum. */
static float weights(float *restrict s, int64_t seen, int64_t whole, float *maximum) {
  float top = s[0], sum = 0;
  for (int64_t j = seen; j < whole; j++) s[j] = -INFINITY;
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < whole; j++) top = s[j] > top ? s[j] : top;
#pragma omp simd
  for (int64_t j = 0; j < whole; j++) s[j] = hp_exp(s[j] - top);
  HP_SUM(sum, whole, s[j]);
  *maximum = top;
  return sum;
}

static void forward_block(float *y, float *lse, const block *b, int64_t h, float *s, int64_t width) {
  const int64_t across = h * b->d;
  float top[HP_QUERIES], sum[HP_QUERIES];
  scores(s, width, b);
  for (int64_t i = 0; i < b->rows; i++) sum[i] = weights(s + i * width, b->first + i + 1, HP_WHOLE(b->end), &top[i]);
  for (int64_t i = 0; i < b->rows; i++) {
    lse[(b->first + i) * h] = top[i] + hp_log(sum[i]);
    sum[i] = 1.0f / sum[i];
  }
  float *out = y + b->first * across;
  hp_sgemm(CblasNoTrans, CblasNoTrans, b->rows, b->d, b->end, 1, s, width, b->v, b->stride, 0, out, across);
  for (int64_t i = 0; i < b->rows; i++)
    for (int64_t j = 0; j < b->d; j++) out[i * across + j] *= sum[i];
}

void hp_attention_fwd(float *y, float *lse, const float *qkv, int64_t n, int64_t t, int64_t h, int64_t k, int64_t d,
    void *work) {
#pragma omp parallel for schedule(dynamic, 1) if (n * t * d * h > HP_GRAIN)
  for (int64_t task = 0; task < n / t * h; task++) {
    const int64_t sequence = task / h, head = task % h;
    block b = block_of(qkv, t, h, k, d, sequence, head);
    float *s = scratch(work, t);
    for (int64_t first = 0; first < t; first += HP_QUERIES) {
      place(&b, first, t);
      forward_block(y + sequence * t * h * d + head * d, lse + sequence * t * h + head, &b, h, s, HP_STRIDE(t));
    }
  }
}

/* From scores and dP: p = exp(s - lse) in place of the scores, dS = p (dP - D) in place of dP; zero where not seen. */
static void slopes(float *restrict s, float *restrict ds, int64_t seen, int64_t whole, float lse, float delta) {
  for (int64_t j = seen; j < whole; j++) {
    s[j] = -INFINITY;
    ds[j] = 0;
  }
#pragma omp simd
  for (int64_t j = 0; j < whole; j++) {
    s[j] = hp_exp(s[j] - lse);
    ds[j] = s[j] * (ds[j] - delta);
  }
}

static float dot(const float *restrict a, const float *restrict b, int64_t d) {
  float sum = 0;
  HP_SUM(sum, d, a[j] * b[j]);
  return sum;
}

/* dy, y and lse start at this head's column; so do dq, dk and dv, whose rows are b->stride apart. */
static void backward_block(float *dq, float *dk, float *dv, const float *dy, const float *y, const float *lse,
    const block *b, int64_t h, float *s, int64_t width, float beta) {
  const int64_t across = h * b->d;
  const float *up = dy + b->first * across, *out = y + b->first * across;
  float *ds = s + HP_QUERIES * width;
  scores(s, width, b);
  hp_sgemm(CblasNoTrans, CblasTrans, b->rows, b->end, b->d, 1, up, across, b->v, b->stride, 0, ds, width);
  for (int64_t i = 0; i < b->rows; i++)
    slopes(s + i * width, ds + i * width, b->first + i + 1, HP_WHOLE(b->end), lse[(b->first + i) * h],
        dot(up + i * across, out + i * across, b->d));
  hp_sgemm(CblasTrans, CblasNoTrans, b->end, b->d, b->rows, 1, s, width, up, across, beta, dv, b->stride);
  hp_sgemm(CblasTrans, CblasNoTrans, b->end, b->d, b->rows, b->scale, ds, width, b->q + b->first * b->stride, b->stride,
      beta, dk, b->stride);
  hp_sgemm(CblasNoTrans, CblasNoTrans, b->rows, b->d, b->end, b->scale, ds, width, b->k, b->stride, 0,
      dq + b->first * b->stride, b->stride);
}

void hp_attention_dx(float *dqkv, const float *dy, const float *y, const float *lse, const float *qkv, int64_t n,
    int64_t t, int64_t h, int64_t k, int64_t d, void *work) {
  const int64_t group = h / k, last = (t - 1) / HP_QUERIES * HP_QUERIES;
#pragma omp parallel for schedule(dynamic, 1) if (n * t * d * h > HP_GRAIN)
  for (int64_t task = 0; task < n / t * k; task++) {
    const int64_t sequence = task / k, kv = task % k;
    float *s = scratch(work, t), *to = dqkv + sequence * t * (h + 2 * k) * d;
    for (int64_t head = kv * group; head < (kv + 1) * group; head++) {
      const int64_t out = sequence * t * h * d + head * d;
      block b = block_of(qkv, t, h, k, d, sequence, head);
      for (int64_t first = last; first >= 0; first -= HP_QUERIES) {
        place(&b, first, t);
        backward_block(to + head * d, to + (h + kv) * d, to + (h + k + kv) * d, dy + out, y + out,
            lse + sequence * t * h + head, &b, h, s, HP_STRIDE(t), head == kv * group && first == last ? 0 : 1);
      }
    }
  }
}
