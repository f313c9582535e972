/* rope.c: rotary positions (Su et al. 2021), in place on the query and key heads.
 *
 * n tokens (sequences of t), h query heads, k key heads, d head width; qkv[n,(h+2k) d] = [q heads | k heads | v heads].
 *   pairs (i, i + d/2) of each head turn by angle = (row % t) theta^(-2i/d):  (a, b) -> (a cos - b sin, b cos + a sin)
 * fwd rotates, dx rotates back; both overwrite. Moves 8 n (h + k) d bytes.
 * The trick: a thread takes a position of all sequences, so that each sine and cosine is computed once a call.
 */
#include "team.h"

#define HP_PAIRS 64

static void rotate(float *qkv, int64_t n, int64_t t, int64_t h, int64_t k, int64_t d, float theta, float sign) {
  const int64_t half = d / 2, row = (h + 2 * k) * d;
  const double ratio = half ? pow((double)theta, -2.0 / (double)d) : 1.0;
#pragma omp parallel for schedule(static) if (n * (h + k) * d > HP_GRAIN)
  for (int64_t p = 0; p < HP_MIN(t, n); p++) {
    double turn[HP_PAIRS], next = (double)p;
    float sine[HP_PAIRS], cosine[HP_PAIRS];
    for (int64_t i0 = 0; i0 < half; i0 += HP_PAIRS) {
      const int64_t pairs = HP_MIN(HP_PAIRS, half - i0);
      for (int64_t i = 0; i < pairs; i++, next *= ratio) turn[i] = next;
      for (int64_t i = 0; i < pairs; i++) {
        hp_sincos(turn[i], &sine[i], &cosine[i]);
        sine[i] *= sign;
      }
      for (int64_t r = p; r < n; r += t)
        for (int64_t head = 0; head < h + k; head++) {
          float *restrict a = qkv + r * row + head * d + i0, *restrict b = a + half;
          for (int64_t i = 0; i < pairs; i++) {
            const float a0 = a[i], b0 = b[i];
            a[i] = a0 * cosine[i] - b0 * sine[i];
            b[i] = b0 * cosine[i] + a0 * sine[i];
          }
        }
    }
  }
}

void hp_rope_fwd(float *qkv, int64_t n, int64_t t, int64_t h, int64_t k, int64_t d, float theta) {
  rotate(qkv, n, t, h, k, d, theta, 1.0f);
}

void hp_rope_dx(float *dqkv, int64_t n, int64_t t, int64_t h, int64_t k, int64_t d, float theta) {
  rotate(dqkv, n, t, h, k, d, theta, -1.0f);
}
