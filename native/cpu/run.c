/* run.c: the team of threads, the walk over a recording, and the peak that shares of a machine are measured against.
 *
 * A team belongs to the thread that called hp_init: several ranks may live in one process, each in a thread of its own.
 * Every thread of a team flushes subnormal numbers to zero, on input and output: late in training they appear in
 * moments and softmax tails and cost a hundred cycles each. The caller's own mode is given back to it after each
 * hp_run.
 * Nothing is allocated while a recording runs.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/mman.h>
#include "product.h"
#if defined(__x86_64__) || defined(__i386__)
#include <xmmintrin.h>
#endif

static _Thread_local int team = 0;

static uint64_t flush_to_zero(void) {
#if defined(__x86_64__) || defined(__i386__)
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040u); /* FTZ and DAZ of MXCSR */
  return before;
#elif defined(__aarch64__)
  uint64_t before;
  __asm__ volatile("mrs %0, fpcr" : "=r"(before));
  __asm__ volatile("msr fpcr, %0" : : "r"(before | (UINT64_C(1) << 24))); /* FZ of FPCR */
  return before;
#else
  return 0;
#endif
}

static void restore(uint64_t before) {
#if defined(__x86_64__) || defined(__i386__)
  _mm_setcsr((unsigned)before);
#elif defined(__aarch64__)
  __asm__ volatile("msr fpcr, %0" : : "r"(before));
#else
  (void)before;
#endif
}

void hp_init(int threads) {
  const uint64_t before = flush_to_zero();
  team = HP_MAX(1, threads);
  omp_set_dynamic(0);
  omp_set_num_threads(team);
#pragma omp parallel num_threads(team)
  flush_to_zero();
  restore(before);
}

int hp_threads(void) { return team; }

void hp_run(const hp_call *calls, int64_t n, char *arena, const int64_t *bases, int64_t work, int threads) {
  if (team != threads) hp_init(threads); /* another backend of this thread may have asked for another size */
  const uint64_t before = flush_to_zero();
  void *shared = work < 0 ? NULL : arena + work;
  omp_set_num_threads(HP_MAX(1, team)); /* another library in this thread may have asked for more than `work` holds */
  for (int64_t i = 0; i < n; i++) hp_dispatch(&calls[i], arena, bases, shared);
  restore(before);
}

/* Products of 768 x 768, one after the other in every thread at once, for about `seconds`. Only this allocates. */
double hp_matmul_peak(double seconds) {
  enum { SIDE = 768, HUGE_PAGE = 2 << 20 };
  const size_t size = (size_t)SIDE * SIDE, work = HP_PRODUCT_WORK(SIDE, SIDE) / sizeof(float);
  const size_t bytes = ((3 * size + work) * sizeof(float) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const uint64_t before = flush_to_zero();
  int64_t products = 0;
  double elapsed = 0;
#pragma omp parallel num_threads(HP_MAX(1, team)) reduction(+ : products) reduction(max : elapsed)
  {
    float *a = aligned_alloc(HUGE_PAGE, bytes);
#ifdef MADV_HUGEPAGE
    if (a) (void)madvise(a, bytes, MADV_HUGEPAGE); /* as the arena of a run has them, where the system does */
#endif
    for (size_t e = 0; a && e < 3 * size + work; e++) a[e] = 1.0f / (float)(1 + e % 7);
#pragma omp barrier
    const double start = omp_get_wtime();
    while (a && elapsed < seconds) {
      const hp_matrix left = {a, SIDE, 0}, right = {a + size, SIDE, 1};
      hp_product(a + 2 * size, SIDE, left, right, SIDE, SIDE, SIDE, NULL, NULL, a + 3 * size);
      products++;
      elapsed = omp_get_wtime() - start;
    }
    free(a);
  }
  restore(before);
  return elapsed > 0 ? 2.0 * SIDE * SIDE * SIDE * (double)products / elapsed : 0;
}
