/* attention.c: causal attention with grouped queries, by blocks of query rows (after Dao et al. 2022).
 *
 * n tokens = sequences of t, h query heads, k key/value heads (query head i reads key/value head i k/h), d head width.
 * qkv[n,(h+2k) d] = [q heads | k heads | v heads]   y[n,h d]   lse[n,h]
 *   fwd: S = q k^T / sqrt(d), causal;  P = exp(S - lse), lse = log sum exp S;  y = P v                  writes y, lse
 *   dx:  D = sum over d of dy y;  dP = dy v^T;  dS = P (dP - D);  dq = dS k / sqrt(d);
 *        dk = dS^T q / sqrt(d);  dv = P^T dy, both summed over the query heads of a group              writes dqkv
 * Moves 4 n (h + 2k) d bytes in and 4 n h d out (fwd), about three times that (dx); the t x t matrix never exists: a
 * thread holds one (fwd) or two (dx) blocks of HP_QUERIES x t in `work`, and the keys of a head as panels.
 * The tricks: tiles of six queries by a vector or two of keys are the unit of all five products, so that nothing beyond
 * them is computed in the masked half; what is multiplied is copied into panels, unless it is short and lies well. dx
 * takes the query blocks from the last to the first: the last one reaches every key, so it writes dk and dv and all
 * others add to them: no clearing, and one fixed order, since one thread owns a key/value head.
 */
#include "product.h"

enum { HP_QUERIES = 72, HP_SIX = 6 };
/* Row stride of a block of scores: not a power of two, whose rows would share a few cache sets. */
#define HP_STRIDE(t) ((t) + 32)
/* Numbers of the panels of one head's keys or values, at most. The table's expression for `work`: two blocks of scores,
 * three such panels, and four of a block's queries. */
#define HP_PANELS(t, d) (((t) + 32) * ((d) + 32))

/* Rows of scores are worked on in whole vectors: up to 15 numbers beyond `end`, which no product reads. */
#define HP_WHOLE(end) (((end) + 15) / 16 * 16)

/* One head of one sequence, and the block of its queries [first, first + rows), which see keys [0, end). */
typedef struct {
  const float *q, *k, *v; /* their first rows in qkv, `stride` numbers from one token to the next */
  int64_t stride, d, first, rows, end;
  float scale;
} block;

/* What a tile multiplies with, by vectors of columns: a set is `next` numbers from the one before, a row `step`. */
typedef struct { const float *x; int64_t next, step; } columns;

/* A thread's part of `work`. */
typedef struct { float *s, *ds, *k, *v, *along, *left, *up, *q_along, *up_along; int64_t width; } scratch;

static scratch scratch_of(void *work, int64_t t, int64_t d) {
  const int64_t scores = HP_QUERIES * HP_STRIDE(t), panels = HP_PANELS(t, d), few = HP_QUERIES * (d + 32);
  float *at = (float *)work + omp_get_thread_num() * (2 * scores + 3 * panels + 4 * few);
  scratch w = {.width = HP_STRIDE(t)};
  w.s = at, w.ds = w.s + scores, w.k = w.ds + scores, w.v = w.k + panels, w.along = w.v + panels;
  w.left = w.along + panels, w.up = w.left + few, w.q_along = w.up + few, w.up_along = w.q_along + few;
  return w;
}

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

/* x^T [d, keys] from x [keys, d]. */
static columns across(float *to, const float *x, int64_t ld, int64_t d, int64_t keys) {
  hp_across(to, x, ld, d, keys, HP_WIDE);
  return (columns){to, HP_WIDE * d, HP_WIDE};
}

/* x [rows, d]: where it lies, if whole vectors fit its rows and a column of them the 64 sets of 8 lines of a cache. */
static columns along(float *to, const float *x, int64_t ld, int64_t rows, int64_t d) {
  const int64_t lines = ld / 16, sets = 64 / HP_MIN(64, HP_MAX(1, lines & -lines));
  if (d % HP_WIDE == 0 && ld % 16 == 0 && rows <= 8 * sets) return (columns){x, HP_WIDE, ld};
  hp_along(to, x, ld, rows, d, HP_WIDE);
  return (columns){to, HP_WIDE * rows, HP_WIDE};
}

/* Keys that the six queries from row i of a block on may see, some of them. */
static int64_t seen_by(const block *b, int64_t i) { return HP_MIN(b->end, b->first + i + HP_SIX); }

static __attribute__((noinline)) void tile_panel(float *c, int64_t ldc, const float *a, const float *b, int64_t k,
    float alpha) {
  hp_tile_of(HP_SIX, c, ldc, a, 1, HP_SIX, b, HP_WIDE, k, HP_SIX, HP_WIDE, alpha, NULL, NULL);
}

static __attribute__((noinline)) void tile_rows(float *c, int64_t ldc, const float *a, int64_t lda, const float *b,
    int64_t step, int64_t k, int64_t m, int64_t n, float alpha) {
  hp_tile_of(HP_SIX, c, ldc, a, lda, 1, b, step, k, m, n, alpha, NULL, NULL);
}

static __attribute__((noinline)) void tile_columns(float *c, int64_t ldc, const float *a, int64_t lda, const float *b,
    int64_t step, int64_t k, int64_t m, int64_t n, float alpha, int add) {
  hp_tile_of(HP_SIX, c, ldc, a, 1, lda, b, step, k, m, n, alpha, add ? c : NULL, NULL);
}

/* s[rows, seen] = alpha x y^T; x [rows, d] goes into panels at `left` first. Whole tiles are written. */
static void scores(float *s, int64_t width, float *left, const float *x, int64_t ld, columns y, const block *b,
    float alpha) {
  hp_across(left, x, ld, b->d, b->rows, HP_SIX);
  for (int64_t j = 0; j < b->end; j += HP_WIDE)
    for (int64_t i = HP_MAX(0, j - b->first) / HP_SIX * HP_SIX; i < b->rows; i += HP_SIX) /* who sees key j */
      tile_panel(s + i * width + j, width, left + i * b->d, y.x + j / HP_WIDE * y.next, b->d, alpha);
}

/* out[rows, d] = alpha s y, y [keys, d] */
static void gather(float *out, int64_t ld, const float *s, int64_t width, columns y, const block *b, float alpha) {
  for (int64_t j = 0; j < b->d; j += HP_WIDE)
    for (int64_t i = 0; i < b->rows; i += HP_SIX)
      tile_rows(out + i * ld + j, ld, s + i * width, width, y.x + j / HP_WIDE * y.next, y.step, seen_by(b, i),
          HP_MIN(HP_SIX, b->rows - i), HP_MIN(HP_WIDE, b->d - j), alpha);
}

/* out[keys, d] (+)= alpha s^T y, y [rows, d]: of each six keys by the queries that see one of them. */
static void spread(float *out, int64_t ld, const float *s, int64_t width, columns y, const block *b, float alpha,
    int add) {
  for (int64_t i = 0; i < b->end; i += HP_SIX) {
    const int64_t from = HP_MAX(0, i - b->first);
    for (int64_t j = 0; j < b->d; j += HP_WIDE)
      tile_columns(out + i * ld + j, ld, s + from * width + i, width, y.x + j / HP_WIDE * y.next + from * y.step,
          y.step, b->rows - from, HP_MIN(HP_SIX, b->end - i), HP_MIN(HP_WIDE, b->d - j), alpha, add);
  }
}

/* Scores of one row become exp(score - max), zero beyond its `seen` keys; returns their sum, and the maximum. */
static float weights(float *restrict s, int64_t seen, int64_t whole, float *maximum) {
  float top = s[0], sum = 0;
  for (int64_t j = seen; j < whole; j++) s[j] = -INFINITY;
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < whole; j++) top = s[j] > top ? s[j] : top;
  HP_SUM(sum, whole, s[j] = hp_exp(s[j] - top));
  *maximum = top;
  return sum;
}

static void forward_block(float *y, float *lse, const block *b, int64_t h, const scratch *w, columns k, columns v) {
  const int64_t ld = h * b->d;
  float top[HP_QUERIES], sum[HP_QUERIES], *out = y + b->first * ld;
  scores(w->s, w->width, w->left, b->q + b->first * b->stride, b->stride, k, b, b->scale);
  for (int64_t i = 0; i < b->rows; i++)
    sum[i] = weights(w->s + i * w->width, b->first + i + 1, HP_WHOLE(seen_by(b, i / HP_SIX * HP_SIX)), &top[i]);
  for (int64_t i = 0; i < b->rows; i++) {
    lse[(b->first + i) * h] = top[i] + hp_log(sum[i]);
    sum[i] = 1.0f / sum[i];
  }
  gather(out, ld, w->s, w->width, v, b, 1.0f);
  for (int64_t i = 0; i < b->rows; i++)
    for (int64_t j = 0; j < b->d; j++) out[i * ld + j] *= sum[i];
}

void hp_attention_fwd(float *y, float *lse, const float *qkv, int64_t n, int64_t t, int64_t h, int64_t k, int64_t d,
    void *work) {
#pragma omp parallel for schedule(dynamic, 1) if (n * t * d * h > HP_GRAIN)
  for (int64_t task = 0; task < n / t * h; task++) {
    const int64_t sequence = task / h, head = task % h;
    const scratch w = scratch_of(work, t, d);
    block b = block_of(qkv, t, h, k, d, sequence, head);
    const columns keys = across(w.k, b.k, b.stride, d, t), values = along(w.along, b.v, b.stride, t, d);
    for (int64_t first = 0; first < t; first += HP_QUERIES) {
      place(&b, first, t);
      forward_block(y + sequence * t * h * d + head * d, lse + sequence * t * h + head, &b, h, &w, keys, values);
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

/* Keys and values of one head, as the tiles want them. */
typedef struct { columns k, v, k_along; } operands;

/* dy, y and lse start at this head's column; so do dq, dk and dv, whose rows are b->stride apart. */
static void backward_block(float *dq, float *dk, float *dv, const float *dy, const float *y, const float *lse,
    const block *b, int64_t h, const scratch *w, const operands *o, int add) {
  const int64_t ld = h * b->d, stride = b->stride, width = w->width;
  const float *up = dy + b->first * ld, *out = y + b->first * ld, *q = b->q + b->first * stride;
  scores(w->s, width, w->left, q, stride, o->k, b, b->scale);
  scores(w->ds, width, w->up, up, ld, o->v, b, 1.0f);
  for (int64_t i = 0; i < b->rows; i++)
    slopes(w->s + i * width, w->ds + i * width, b->first + i + 1, HP_WHOLE(seen_by(b, i / HP_SIX * HP_SIX)),
        lse[(b->first + i) * h], dot(up + i * ld, out + i * ld, b->d));
  spread(dv, stride, w->s, width, along(w->up_along, up, ld, b->rows, b->d), b, 1.0f, add);
  spread(dk, stride, w->ds, width, along(w->q_along, q, stride, b->rows, b->d), b, b->scale, add);
  gather(dq + b->first * stride, stride, w->ds, width, o->k_along, b, b->scale);
}

void hp_attention_dx(float *dqkv, const float *dy, const float *y, const float *lse, const float *qkv, int64_t n,
    int64_t t, int64_t h, int64_t k, int64_t d, void *work) {
  const int64_t group = h / k, last = (t - 1) / HP_QUERIES * HP_QUERIES;
#pragma omp parallel for schedule(dynamic, 1) if (n * t * d * h > HP_GRAIN)
  for (int64_t task = 0; task < n / t * k; task++) {
    const int64_t sequence = task / k, kv = task % k;
    const scratch w = scratch_of(work, t, d);
    const block shared = block_of(qkv, t, h, k, d, sequence, kv * group);
    const operands o = {across(w.k, shared.k, shared.stride, d, t), across(w.v, shared.v, shared.stride, d, t),
        along(w.along, shared.k, shared.stride, t, d)};
    float *to = dqkv + sequence * t * (h + 2 * k) * d;
    for (int64_t head = kv * group; head < (kv + 1) * group; head++) {
      const int64_t out = sequence * t * h * d + head * d;
      block b = block_of(qkv, t, h, k, d, sequence, head);
      for (int64_t first = last; first >= 0; first -= HP_QUERIES) {
        place(&b, first, t);
        backward_block(to + head * d, to + (h + kv) * d, to + (h + k + kv) * d, dy + out, y + out,
            lse + sequence * t * h + head, &b, h, &w, &o, head != kv * group || first != last);
      }
    }
  }
}
