/* formula.h: the scalar formulas, one home for C and (with HP_FN redefined for the device) CUDA.
 *
 * Each is straight-line code without calls, tables or branches, so that a loop over it becomes vector code on any
 * machine. A NaN goes in, a NaN comes out: a run that has diverged must show it.
 */
#ifndef HPCPIPE_FORMULA_H
#define HPCPIPE_FORMULA_H
#ifdef __CUDACC_RTC__ /* NVRTC has no headers; it knows memcpy and the mathematical functions */
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#else
#include <math.h>
#include <stdint.h>
#include <string.h>
#endif

#ifndef HP_FN
#ifdef __CUDACC__
#define HP_FN static __device__ __forceinline__
#else
#define HP_FN static inline
#endif
#endif

HP_FN float hp_float_of(int32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

HP_FN int32_t hp_bits_of(float value) {
  int32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

/* The upper 16 bits of a float32, rounded to nearest even: a bfloat16. A NaN stays one. */
HP_FN uint16_t hp_bfloat16_of(float value) {
  const uint32_t bits = (uint32_t)hp_bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded);
}

HP_FN float hp_float_of_bfloat16(uint16_t half) { return hp_float_of((int32_t)((uint32_t)half << 16)); }

/* exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2)/2, the polynomial of Cephes' expf; within 2 ulp.
 * Below -87.33 it is 0 (the result would be subnormal), above 88.37 infinite. */
HP_FN float hp_exp(float x) {
  const float round = 12582912.0f; /* 1.5 * 2^23: adding it leaves the rounded integer in the low bits */
  const float z = x * 1.44269504088896341f + round;
  const float n = z - round;
  float r = x - n * 0.693359375f; /* ln 2 in two parts: the first product is exact */
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  p = p * hp_float_of((int32_t)(((uint32_t)hp_bits_of(z) << 23) + (127u << 23)));
  p = x < -87.3365447505531f ? 0.0f : p;
  return x > 88.3762626647949f ? INFINITY : p;
}

/* log(x) for normal x > 0: x = 2^n m, sqrt(1/2) <= m < sqrt(2), the polynomial of Cephes' logf; within 2 ulp. */
HP_FN float hp_log(float x) {
  const int32_t shifted = hp_bits_of(x) - 0x3f3504f3; /* the bits of sqrt(1/2) */
  const float n = (float)(shifted >> 23);
  const float r = hp_float_of((shifted & 0x007fffff) + 0x3f3504f3) - 1.0f;
  float p = 7.0376836292e-2f;
  p = p * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  const float r2 = r * r;
  p = p * (r2 * r) + n * -2.12194440e-4f - 0.5f * r2;
  p = r + p + n * 0.693359375f;
  return x < INFINITY ? p : x;
}

HP_FN float hp_sigmoid(float x) { return 1.0f / (1.0f + hp_exp(-x)); }

/* GELU in its tanh form, by (1 + tanh(u)) / 2 = sigmoid(2u):  y = x sigmoid(2 a (x + b x^3)), a = sqrt(2/pi) */
#define HP_GELU_2A 1.5957691216057308f
#define HP_GELU_B 0.044715f
HP_FN float hp_gelu(float x) { return x * hp_sigmoid(HP_GELU_2A * (x + HP_GELU_B * x * x * x)); }

/* dy/dx = s + x s (1 - s) 2a (1 + 3 b x^2) */
HP_FN float hp_gelu_slope(float x) {
  const float s = hp_sigmoid(HP_GELU_2A * (x + HP_GELU_B * x * x * x));
  return s + x * s * (1.0f - s) * HP_GELU_2A * (1.0f + 3.0f * HP_GELU_B * x * x);
}

/* silu(x) = x s;  its slope = s (1 + x (1 - s)),  s = sigmoid(x) */
HP_FN float hp_silu_slope(float x, float s) { return s * (1.0f + x * (1.0f - s)); }

/* sin and cos of an angle in double (position times frequency loses digits in float): reduce by multiples of pi/2 in
 * double, then the polynomials of Cephes' sinf and cosf on [-pi/4, pi/4]; within 2 ulp for |angle| < 1e6. */
HP_FN void hp_sincos(double angle, float *sine, float *cosine) {
  const double round = 6755399441055744.0; /* 1.5 * 2^52 */
  const double n = (angle * 0.63661977236758134308 + round) - round;
  double reduced = angle - n * 1.57079632679489655800;
  reduced = reduced - n * 6.12323399573676603587e-17;
  const float r = (float)reduced, r2 = r * r;
  const int32_t quadrant = (int32_t)n;
  float s = -1.9515295891e-4f;
  s = s * r2 + 8.3321608736e-3f;
  s = s * r2 - 1.6666654611e-1f;
  s = s * (r2 * r) + r;
  float c = 2.443315711809948e-5f;
  c = c * r2 - 1.388731625493765e-3f;
  c = c * r2 + 4.166664568298827e-2f;
  c = c * (r2 * r2) - 0.5f * r2 + 1.0f;
  const float a = (quadrant & 1) ? c : s, b = (quadrant & 1) ? s : c;
  *sine = (quadrant & 2) ? -a : a;
  *cosine = ((quadrant + 1) & 2) ? -b : b;
}

/* The finaliser of splitmix64 (Steele, Lea, Flood 2014). */
#define HP_GOLDEN 0x9E3779B97F4A7C15ull
HP_FN uint64_t hp_mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

/* Dropout draws 32 bits for element e from a state made of (seed, step, sample, salt): no generator has a memory. */
HP_FN uint64_t hp_dropout_state(const int64_t *key, int64_t salt) {
  uint64_t state = HP_GOLDEN;
  for (int i = 0; i < 3; i++) state = hp_mix((state ^ (uint64_t)key[i]) + HP_GOLDEN);
  return hp_mix((state ^ (uint64_t)salt) + HP_GOLDEN);
}
HP_FN uint32_t hp_dropout_bits(uint64_t state, int64_t element) {
  return (uint32_t)(hp_mix(state + ((uint64_t)element + 1) * HP_GOLDEN) >> 32);
}

/* AdamW (Loshchilov & Hutter 2019, algorithm 2) on one element; the bias corrections come as reciprocals. */
typedef struct { float lr, beta1, beta2, rest1, rest2, eps, inverse1, inverse2, scale, decay; } hp_adamw;
/* a b + c in one rounding where the machine has it in one instruction, said and not left to the compiler: two kernels
 * that must agree to the last bit may not be contracted in two ways. */
#if defined(FP_FAST_FMAF) || defined(__CUDACC__)
#define HP_FMA(a, b, c) fmaf(a, b, c)
#else
#define HP_FMA(a, b, c) ((a) * (b) + (c))
#endif

/* The moments after a step. Whoever needs them gets them from here, so that two passes agree to the last bit. */
HP_FN void hp_adamw_moments(const hp_adamw *a, float g, float m, float v, float *m1, float *v1) {
  const float scaled = a->scale * g;
  *m1 = HP_FMA(a->beta1, m, a->rest1 * scaled);
  *v1 = HP_FMA(a->beta2, v, a->rest2 * scaled * scaled);
}
HP_FN float hp_adamw_value(const hp_adamw *a, float p, float m1, float v1) {
  return HP_FMA(-a->lr, HP_FMA(a->decay, p, m1 * a->inverse1 / (sqrtf(v1 * a->inverse2) + a->eps)), p);
}

#endif
