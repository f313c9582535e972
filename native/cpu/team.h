/* team.h: what the kernel families of this folder share: when to share work, and how columns are summed.
 *
 * One rule holds for all: how work is cut never decides in which order numbers are added, so a result has the same bits
 * for any number of threads.
 */
#ifndef HPCPIPE_TEAM_H
#define HPCPIPE_TEAM_H
#include <omp.h>
#include "formula.h"
#include "hpcpipe.h"

/* Loops over fewer elements than this run in the calling thread: waking a team costs about a microsecond. */
#define HP_GRAIN 8192
/* Elementwise loops are shared in pieces of this many elements. */
#define HP_PIECE 2048
#define HP_MIN(a, b) ((a) < (b) ? (a) : (b))
#define HP_MAX(a, b) ((a) > (b) ? (a) : (b))

/* A loop over elements e, shared in fixed pieces: where a piece ends, and so which elements the vector loop leaves to
 * its scalar tail, is the same for any number of threads. */
#define HP_EACH_ELEMENT(size_, ...)                                                   \
  do {                                                                                \
    const int64_t end_ = (size_);                                                     \
    _Pragma("omp parallel for schedule(static) if (end_ > HP_GRAIN)")                 \
    for (int64_t e0_ = 0; e0_ < end_; e0_ += HP_PIECE) {                              \
      const int64_t e1_ = HP_MIN(end_, e0_ + HP_PIECE);                               \
      _Pragma("omp simd")                                                             \
      for (int64_t e = e0_; e < e1_; e++) { __VA_ARGS__ }                             \
    }                                                                                 \
  } while (0)

/* sum += terms over j in [0, n): HP_LANES running sums, added in pairs at the end. The compiler, left to itself, either
 * keeps one running sum or adds the lanes of a vector one by one. */
#define HP_LANES 32
typedef float hp_vector16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef float hp_vector8 __attribute__((vector_size(32), aligned(4)));
typedef float hp_vector4 __attribute__((vector_size(16), aligned(4)));
/* Left to itself, the compiler clears them by a string instruction, which takes longer than many a sum. */
#define HP_CLEAR(lanes) \
  (*(hp_vector16 *)(lanes) = (hp_vector16){0}, *(hp_vector16 *)((lanes) + 16) = (hp_vector16){0})
static inline float hp_sum_lanes(const float *lane) {
  hp_vector16 a, b;
  hp_vector8 c, d;
  hp_vector4 e, f;
  memcpy(&a, lane, sizeof a), memcpy(&b, lane + 16, sizeof b);
  a += b;
  memcpy(&c, &a, sizeof c), memcpy(&d, (const char *)&a + sizeof d, sizeof d);
  c += d;
  memcpy(&e, &c, sizeof e), memcpy(&f, (const char *)&c + sizeof f, sizeof f);
  e += f;
  return (e[0] + e[2]) + (e[1] + e[3]);
}
#define HP_SUM(sum, n, term)                                                          \
  do {                                                                                \
    float lane_[HP_LANES];                                                            \
    HP_CLEAR(lane_);                                                                  \
    int64_t first_ = 0;                                                               \
    for (; first_ + HP_LANES <= (n); first_ += HP_LANES)                              \
      for (int64_t l_ = 0; l_ < HP_LANES; l_++) {                                     \
        const int64_t j = first_ + l_;                                                \
        lane_[l_] += (term);                                                          \
      }                                                                               \
    for (int64_t j = first_; j < (n); j++) lane_[j - first_] += (term);               \
    sum += hp_sum_lanes(lane_);                                                       \
  } while (0)

/* Sums over rows: columns go in chunks of HP_LANES whose sums stay in registers, rows in blocks of HP_ROWS whose sums
 * are then added to the result. A column's additions have one order, wherever its chunk is computed. */
#define HP_ROWS 64
static inline int64_t hp_column_slab(int64_t c) {
  const int64_t share = (c + omp_get_max_threads() - 1) / omp_get_max_threads();
  return (share + HP_LANES - 1) / HP_LANES * HP_LANES;
}

/* dst[j] += sum over i of `term`, for columns [j0, j1) of rows [i0, i1); `term` is an expression in i and j. */
#define HP_COLUMN_SUM(dst, i0, i1, j0, j1, term)                                      \
  do {                                                                                \
    for (int64_t first_ = (j0); first_ < (j1); first_ += HP_LANES) {                  \
      float sum_[HP_LANES];                                                           \
      HP_CLEAR(sum_);                                                                 \
      if ((j1) - first_ >= HP_LANES) {                                                \
        for (int64_t i = (i0); i < (i1); i++)                                         \
          for (int64_t l_ = 0; l_ < HP_LANES; l_++) {                                 \
            const int64_t j = first_ + l_;                                            \
            sum_[l_] += (term);                                                       \
          }                                                                           \
      } else {                                                                        \
        for (int64_t i = (i0); i < (i1); i++)                                         \
          for (int64_t l_ = 0; l_ < (j1) - first_; l_++) {                            \
            const int64_t j = first_ + l_;                                            \
            sum_[l_] += (term);                                                       \
          }                                                                           \
      }                                                                               \
      for (int64_t l_ = 0; l_ < HP_MIN(HP_LANES, (j1) - first_); l_++) (dst)[first_ + l_] += sum_[l_]; \
    }                                                                                 \
  } while (0)

#endif
