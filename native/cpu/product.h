/* product.h: c = op(a) op(b) + what it starts from, in float32 by a team, after Goto & van de Geijn 2008
 * (doi:10.1145/1356052.1356053).
 *
 * Blocks of a, HP_DEEP deep, are copied by all threads into panels of HP_TALL rows; then strips of b's columns are
 * handed out, and whoever takes one copies it into panels of HP_WIDE columns and multiplies. The innermost loop holds
 * HP_TALL x HP_WIDE sums in registers and reads its operands one after the other, so that they are fetched in time.
 * Where b has few columns, copying a takes longer than it saves, and its rows are read where they lie.
 * The trick: a sum's order is that of its depth, cut into blocks by the depth alone. So its bits depend on nothing
 * else: not on the number of threads, not on how many rows or columns are asked for at once, not on a library.
 */
#ifndef HPCPIPE_PRODUCT_H
#define HPCPIPE_PRODUCT_H
#include "team.h"

/* Sums in registers: rows, vectors of columns, and the lanes of a vector. */
#if defined(__AVX512F__)
enum { HP_TALL = 12, HP_VECTORS = 2, HP_VECTOR = 16 };
#elif defined(__AVX2__)
enum { HP_TALL = 6, HP_VECTORS = 2, HP_VECTOR = 8 };
#elif defined(__aarch64__)
enum { HP_TALL = 6, HP_VECTORS = 4, HP_VECTOR = 4 };
#else
enum { HP_TALL = 6, HP_VECTORS = 2, HP_VECTOR = 4 };
#endif
enum {
  HP_WIDE = HP_VECTORS * HP_VECTOR,
  HP_DEEP = 768,          /* depth of a block: the deeper, the less often c is read and written again */
  HP_BLOCK = 120,         /* rows of a that stay in the second-level cache, a multiple of HP_TALL */
  HP_ROWS_AT_ONCE = 1032, /* rows of a that are copied at once, at most, likewise */
  HP_STRIP = 96,          /* columns of b that one thread copies at once, at most; a multiple of HP_WIDE */
  HP_FEW = 4 * HP_STRIP   /* columns of b up to which a's rows are read where they lie: above, copying them paid */
};
typedef float hp_vec __attribute__((vector_size(4 * HP_VECTOR), aligned(4), may_alias));
#if defined(__clang__)
#define HP_MIX(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t hp_int4 __attribute__((vector_size(16)));
#define HP_MIX(a, b, i, j, k, l) __builtin_shuffle(a, b, (hp_int4){i, j, k, l})
#endif

/* Bytes of work per thread for m rows by a depth of k: the team's panels of a, and a thread's of a strip of b. */
#define HP_PRODUCT_WORK(m, k) (4 * HP_MIN(k, HP_DEEP) * (HP_MIN((m) + HP_TALL, HP_ROWS_AT_ONCE) + HP_STRIP))

/* A matrix: element (i, j) of op(x) is x[i ld + j], or x[j ld + i] where it is transposed. */
typedef struct { const float *x; int64_t ld; int transposed; } hp_matrix;

/* The compiler may not load the next row's number before this one's products: it would run out of registers. */
#define HP_IN_ORDER() __asm__ volatile("" ::: "memory")

/* c[m, n] = alpha a b + from + bias, where a(i, p) = a[i ai + p ap] and row p of b begins at b + p bp. `from` lies like
 * c, and may be c; NULL for none. Reads `tall` rows of a and HP_WIDE columns of b whatever m and n are. Made for each
 * kind of operands by giving constants: `tall`, strides. */
static inline __attribute__((always_inline)) void hp_tile_of(const int tall, float *c, int64_t ldc, const float *a,
    int64_t ai, int64_t ap, const float *b, int64_t bp, int64_t k, int64_t m, int64_t n, float alpha,
    const float *from, const float *bias) {
  hp_vec sum[HP_TALL][HP_VECTORS] = {{{0}}};
  for (int64_t i = 0; i < m; i++) {
    __builtin_prefetch(c + i * ldc, 1);
    __builtin_prefetch(c + i * ldc + HP_WIDE - 1, 1);
  }
#pragma GCC unroll 4
  for (int64_t p = 0; p < k; p++, a += ap, b += bp) {
    hp_vec row[HP_VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < HP_VECTORS; j++) row[j] = *(const hp_vec *)(b + j * HP_VECTOR);
#pragma GCC unroll 12
    for (int i = 0; i < tall; i++) {
#pragma GCC unroll 4
      for (int j = 0; j < HP_VECTORS; j++) sum[i][j] += a[i * ai] * row[j];
      HP_IN_ORDER();
    }
  }
  if (m == tall && n == HP_WIDE) {
#pragma GCC unroll 12
    for (int i = 0; i < tall; i++)
#pragma GCC unroll 4
      for (int j = 0; j < HP_VECTORS; j++) {
        hp_vec *to = (hp_vec *)(c + i * ldc + j * HP_VECTOR);
        hp_vec start = from ? *(const hp_vec *)(from + i * ldc + j * HP_VECTOR) : (hp_vec){0};
        if (bias) start += *(const hp_vec *)(bias + j * HP_VECTOR);
        *to = alpha * sum[i][j] + start;
      }
    return;
  }
  float out[HP_TALL][HP_WIDE];
#pragma GCC unroll 12
  for (int i = 0; i < tall; i++)
#pragma GCC unroll 4
    for (int j = 0; j < HP_VECTORS; j++) *(hp_vec *)&out[i][j * HP_VECTOR] = sum[i][j];
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++)
      c[i * ldc + j] = alpha * out[i][j] + ((from ? from[i * ldc + j] : 0.0f) + (bias ? bias[j] : 0.0f));
}

/* Both operands in panels. */
static __attribute__((noinline, unused)) void hp_tile(float *c, int64_t ldc, const float *a, const float *b, int64_t k,
    int64_t m, int64_t n, const float *from, const float *bias) {
  hp_tile_of(HP_TALL, c, ldc, a, 1, HP_TALL, b, HP_WIDE, k, m, n, 1.0f, from, bias);
}

/* HP_TALL rows of a where they lie, b in a panel. */
static __attribute__((noinline, unused)) void hp_tile_rows(float *c, int64_t ldc, const float *a, int64_t lda,
    const float *b, int64_t k, int64_t n, const float *from, const float *bias) {
  hp_tile_of(HP_TALL, c, ldc, a, lda, 1, b, HP_WIDE, k, HP_TALL, n, 1.0f, from, bias);
}

/* Four rows of four numbers change places with their columns: to[j w + i] = x[i ld + j]. */
static inline void hp_turn4(float *restrict to, int64_t w, const float *restrict x, int64_t ld) {
  hp_vector4 r0, r1, r2, r3;
  memcpy(&r0, x, 16), memcpy(&r1, x + ld, 16), memcpy(&r2, x + 2 * ld, 16), memcpy(&r3, x + 3 * ld, 16);
  const hp_vector4 a = HP_MIX(r0, r1, 0, 4, 1, 5), b = HP_MIX(r0, r1, 2, 6, 3, 7);
  const hp_vector4 c = HP_MIX(r2, r3, 0, 4, 1, 5), d = HP_MIX(r2, r3, 2, 6, 3, 7);
  const hp_vector4 s0 = HP_MIX(a, c, 0, 1, 4, 5), s1 = HP_MIX(a, c, 2, 3, 6, 7);
  const hp_vector4 s2 = HP_MIX(b, d, 0, 1, 4, 5), s3 = HP_MIX(b, d, 2, 3, 6, 7);
  memcpy(to, &s0, 16), memcpy(to + w, &s1, 16), memcpy(to + 2 * w, &s2, 16), memcpy(to + 3 * w, &s3, 16);
}

static inline void hp_turn2(float *restrict to, int64_t w, const float *restrict x, int64_t ld) {
  hp_vector4 r0, r1;
  memcpy(&r0, x, 16), memcpy(&r1, x + ld, 16);
  const hp_vector4 a = HP_MIX(r0, r1, 0, 4, 1, 5), b = HP_MIX(r0, r1, 2, 6, 3, 7);
  memcpy(to, &a, 8), memcpy(to + w, (const char *)&a + 8, 8);
  memcpy(to + 2 * w, &b, 8), memcpy(to + 3 * w, (const char *)&b + 8, 8);
}

/* Panels of `width` lines each: panel[p width + l] = line l at depth p, zero for lines that are not there. Lines lie
 * `ld` apart and are read along their length, four at a time ... */
static inline __attribute__((always_inline)) void hp_across(float *restrict to, const float *restrict x, int64_t ld,
    int64_t k, int64_t lines, const int width) {
  for (; lines > 0; lines -= width, x += width * ld, to += width * k) {
    const int64_t here = HP_MIN(width, lines);
    int64_t l = 0;
    for (; l + 4 <= here; l += 4) {
      int64_t p = 0;
      for (; p + 4 <= k; p += 4) hp_turn4(to + p * width + l, width, x + l * ld + p, ld);
      for (; p < k; p++)
        for (int64_t q = l; q < l + 4; q++) to[p * width + q] = x[q * ld + p];
    }
    for (; l + 2 <= here; l += 2) {
      int64_t p = 0;
      for (; p + 4 <= k; p += 4) hp_turn2(to + p * width + l, width, x + l * ld + p, ld);
      for (; p < k; p++) to[p * width + l] = x[l * ld + p], to[p * width + l + 1] = x[(l + 1) * ld + p];
    }
    for (; l < width; l++)
      for (int64_t p = 0; p < k; p++) to[p * width + l] = l < here ? x[l * ld + p] : 0;
  }
}

/* ... or their numbers do: depth by depth, all panels at once, since memory is read in lines and not in columns. */
static inline __attribute__((always_inline)) void hp_along(float *restrict to, const float *restrict x, int64_t ld,
    int64_t k, int64_t lines, const int width) {
  const int64_t whole = lines / width, rest = lines % width;
  for (int64_t p = 0; p < k; p++, x += ld, to += width) {
    for (int64_t i = 0; i < whole; i++) memcpy(to + i * width * k, x + i * width, (size_t)width * sizeof *to);
    for (int64_t l = 0; rest && l < width; l++) to[whole * width * k + l] = l < rest ? x[whole * width + l] : 0;
  }
}
static inline void hp_panels_a(float *to, hp_matrix a, int64_t i, int64_t p, int64_t k, int64_t lines) {
  if (a.transposed) hp_along(to, a.x + p * a.ld + i, a.ld, k, lines, HP_TALL);
  else hp_across(to, a.x + i * a.ld + p, a.ld, k, lines, HP_TALL);
}
static inline void hp_panels_b(float *to, hp_matrix b, int64_t j, int64_t p, int64_t k, int64_t lines) {
  if (b.transposed) hp_across(to, b.x + j * b.ld + p, b.ld, k, lines, HP_WIDE);
  else hp_along(to, b.x + p * b.ld + j, b.ld, k, lines, HP_WIDE);
}

/* Columns [j0, j1) and rows [i0, i1) of c: panels of a against those of a strip of b. */
static inline void hp_strip(float *c, int64_t ldc, const float *a, const float *b, int64_t i0, int64_t i1, int64_t j0,
    int64_t j1, int64_t k, const float *from, const float *bias) {
  for (; i0 < i1; i0 += HP_BLOCK)
    for (int64_t j = j0; j < j1; j += HP_WIDE)
      for (int64_t i = i0; i < HP_MIN(i1, i0 + HP_BLOCK); i += HP_TALL)
        hp_tile(c + i * ldc + j, ldc, a + i * k, b + (j - j0) * k, k, HP_MIN(HP_TALL, i1 - i), HP_MIN(HP_WIDE, j1 - j),
            from ? from + i * ldc + j : NULL, bias ? bias + j : NULL);
}

/* The same with the rows of a where they lie, `lda` apart; rows that do not fill a tile are copied to `last`. */
static inline void hp_strip_rows(float *c, int64_t ldc, const float *a, int64_t lda, const float *b, float *last,
    int64_t i0, int64_t i1, int64_t j0, int64_t j1, int64_t k, const float *from, const float *bias) {
  const int64_t whole = i0 + (i1 - i0) / HP_TALL * HP_TALL;
  for (int64_t first = i0; first < whole; first += HP_BLOCK)
    for (int64_t j = j0; j < j1; j += HP_WIDE)
      for (int64_t i = first; i < HP_MIN(whole, first + HP_BLOCK); i += HP_TALL)
        hp_tile_rows(c + i * ldc + j, ldc, a + i * lda, lda, b + (j - j0) * k, k, HP_MIN(HP_WIDE, j1 - j),
            from ? from + i * ldc + j : NULL, bias ? bias + j : NULL);
  if (whole == i1) return;
  hp_across(last, a + whole * lda, lda, k, i1 - whole, HP_TALL);
  for (int64_t j = j0; j < j1; j += HP_WIDE)
    hp_tile(c + whole * ldc + j, ldc, last, b + (j - j0) * k, k, i1 - whole, HP_MIN(HP_WIDE, j1 - j),
        from ? from + whole * ldc + j : NULL, bias ? bias + j : NULL);
}

/* n things in parts of equal size, a multiple of `unit`, at least `count` parts of them if there are enough. */
static inline int64_t hp_share(int64_t n, int64_t count, int64_t unit) {
  return HP_MAX(1, (n + count * unit - 1) / (count * unit)) * unit;
}

/* c[m, n] = from + bias + a[m, k] b[k, n]; `from` lies like c and may be c. Both may be absent. */
static inline void hp_product(float *c, int64_t ldc, hp_matrix a, hp_matrix b, int64_t m, int64_t n, int64_t k,
    const float *from, const float *bias, void *work) {
  const int in_place = n <= HP_FEW && !a.transposed;
  const int64_t deep = hp_share(k, (k + HP_DEEP - 1) / HP_DEEP, 1);
  const int64_t tall = hp_share(m, (m + HP_ROWS_AT_ONCE - 1) / HP_ROWS_AT_ONCE, HP_TALL);
#pragma omp parallel if ((double)m * (double)n * (double)k > 262144)
  {
    const int64_t turns = 4 * omp_get_num_threads(); /* for each thread to have a few: cores are not equally fast */
    const int64_t wide = hp_share(n, (n + HP_STRIP - 1) / HP_STRIP, HP_WIDE), strips = (n + wide - 1) / wide;
    const int64_t part = hp_share(tall, omp_get_num_threads() > 1 ? (turns + strips - 1) / strips : 1, HP_TALL);
    const int64_t parts = (tall + part - 1) / part;
    float *shared = work, *own = shared + omp_get_thread_num() * (wide + HP_TALL * in_place) * deep;
    if (!in_place) own += tall * deep;
    for (int64_t i0 = 0; i0 < m; i0 += tall)
      for (int64_t p = 0; p < k; p += deep) {
        const int64_t rows = HP_MIN(tall, m - i0), d = HP_MIN(deep, k - p);
        /* The first block of depth begins, the others go on. */
        const float *start = p > 0 ? c + i0 * ldc : from ? from + i0 * ldc : NULL, *bottom = p > 0 ? NULL : bias;
        int64_t mine = -1; /* the strip of b in `own` */
        if (!in_place) {
#pragma omp for schedule(static)
          for (int64_t i = 0; i < rows; i += 8 * HP_TALL)
            hp_panels_a(shared + i * d, a, i0 + i, p, d, HP_MIN(8 * HP_TALL, rows - i));
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < strips * parts; task++) {
          const int64_t j0 = task / parts * wide, j1 = HP_MIN(n, j0 + wide), r0 = task % parts * part;
          const int64_t r1 = HP_MIN(rows, r0 + part);
          if (r0 >= r1) continue;
          if (mine != j0) hp_panels_b(own, b, j0, p, d, j1 - j0);
          mine = j0;
          if (in_place)
            hp_strip_rows(c + i0 * ldc, ldc, a.x + i0 * a.ld + p, a.ld, own, own + wide * d, r0, r1, j0, j1, d, start,
                bottom);
          else
            hp_strip(c + i0 * ldc, ldc, shared, own, r0, r1, j0, j1, d, start, bottom);
        }
      }
  }
}
#endif
