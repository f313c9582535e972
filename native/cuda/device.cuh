/* device.cuh: what a kernel of this folder asks of the machine below CUDA C++: vector access, reductions, tensor cores.
 *
 * A is the compute type: float, or uint16_t that holds bfloat16 bits. Arithmetic is float32 whatever A is: a load
 * converts to float, a store rounds to nearest even. One source compiles under nvcc, under NVRTC (no host headers) and,
 * with HP_ON_HOST, under g++ (tests/gpu/host/cuda_on_host.h goes before it): a wrapper of PTX has a twin there.
 * Sums are trees of a fixed shape: no result depends on which thread comes first. */
#ifndef HPCPIPE_DEVICE_CUH
#define HPCPIPE_DEVICE_CUH
#include "formula.h"

#ifdef HP_ON_HOST
typedef uintptr_t hp_address;
#else
typedef unsigned long long hp_address;
/* Dynamic shared memory, 16-byte aligned, as `type *name`; one per kernel, cut it with pointers. */
extern __shared__ __align__(16) unsigned char hp_dynamic_shared[];
#define HP_DYNAMIC_SHARED(type, name) type *const name = reinterpret_cast<type *>(hp_dynamic_shared)
#endif

/* Both variants of an entry from a template over A of the same name: HP_ENTRY(gelu_fwd, 256, (A *y, const A *x, int64_t
 * n), (y, x, n)) makes hp_gelu_fwd, which calls gelu_fwd<float>(y, x, n), and hp_gelu_fwd_h with uint16_t; 256 is the
 * largest block. */
#define HP_ENTRY(name, threads, params, args)                                                              \
  namespace hp_single {                                                                                    \
  typedef float A;                                                                                         \
  extern "C" __global__ void __launch_bounds__(threads) hp_##name params { ::name<A> args; }               \
  }                                                                                                        \
  namespace hp_halved {                                                                                    \
  typedef uint16_t A;                                                                                      \
  extern "C" __global__ void __launch_bounds__(threads) hp_##name##_h params { ::name<A> args; }           \
  }

/* ---- where a thread is -------------------------------------------------------------------------------------------- */
HP_FN int hp_thread(void) {
  return (int)(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}
HP_FN int hp_threads(void) { return (int)(blockDim.x * blockDim.y * blockDim.z); }
HP_FN int hp_lane(void) { return hp_thread() & 31; }
HP_FN int hp_warp(void) { return hp_thread() >> 5; }

/* ---- conversions -------------------------------------------------------------------------------------------------- */
/* Two bfloat16 in one register, `low` in the lower half; a NaN stays one, its payload may differ from formula.h's. */
HP_FN uint32_t hp_bfloat16x2_of(float low, float high) {
#ifdef HP_ON_HOST
  return (uint32_t)hp_bfloat16_of(low) | (uint32_t)hp_bfloat16_of(high) << 16;
#else
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#endif
}
HP_FN float hp_low_of(uint32_t pair) { return hp_float_of((int32_t)(pair << 16)); }
HP_FN float hp_high_of(uint32_t pair) { return hp_float_of((int32_t)(pair & 0xffff0000u)); }

/* A float32 as the tensor cores take it with 10 bits of mantissa: nearest, ties away from zero. */
HP_FN uint32_t hp_tf32_of(float value) {
#ifdef HP_ON_HOST
  const uint32_t bits = (uint32_t)hp_bits_of(value);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
#endif
}

/* One element of the compute type as a float; and `hp_put(&y[i], v)` rounds a float into one. */
HP_FN float hp_get(float value) { return value; }
HP_FN float hp_get(uint16_t value) { return hp_float_of_bfloat16(value); }
HP_FN void hp_put(float *to, float value) { *to = value; }
HP_FN void hp_put(uint16_t *to, float value) {
#ifdef HP_ON_HOST
  *to = hp_bfloat16_of(value);
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(*to) : "f"(value));
#endif
}

/* ---- vector access: N = 4 or 8 elements at an address of N * sizeof(A) bytes or 16, whichever is less -------------- */
/* Elements of A in 16 bytes: 4 or 8. */
template <typename A>
struct hp_vector {
  enum { size = 16 / sizeof(A) };
};

/* Whether rows of c elements can be read 16 bytes at a time from `base`. */
template <typename A>
HP_FN bool hp_rows_aligned(const A *base, int64_t c) {
  return (((hp_address)base | (hp_address)(c * (int64_t)sizeof(A))) & 15) == 0;
}

template <int N>
HP_FN void hp_load(const float *from, float (&v)[N]) {
  static_assert(N % 4 == 0, "16 bytes at a time");
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const float4 q = *reinterpret_cast<const float4 *>(from + i);
    v[i] = q.x, v[i + 1] = q.y, v[i + 2] = q.z, v[i + 3] = q.w;
  }
}
HP_FN void hp_unpack(uint32_t pair, float *v) { v[0] = hp_low_of(pair), v[1] = hp_high_of(pair); }
template <int N>
HP_FN void hp_load(const uint16_t *from, float (&v)[N]) {
  static_assert(N == 4 || N % 8 == 0, "8 or 16 bytes at a time");
  if constexpr (N == 4) {
    const uint2 q = *reinterpret_cast<const uint2 *>(from);
    hp_unpack(q.x, v), hp_unpack(q.y, v + 2);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 8) {
      const uint4 q = *reinterpret_cast<const uint4 *>(from + i);
      hp_unpack(q.x, v + i), hp_unpack(q.y, v + i + 2), hp_unpack(q.z, v + i + 4), hp_unpack(q.w, v + i + 6);
    }
  }
}

template <int N>
HP_FN void hp_store(float *to, const float (&v)[N]) {
  static_assert(N % 4 == 0, "16 bytes at a time");
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    *reinterpret_cast<float4 *>(to + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
  }
}
HP_FN uint32_t hp_packed(const float *v) { return hp_bfloat16x2_of(v[0], v[1]); }
template <int N>
HP_FN void hp_store(uint16_t *to, const float (&v)[N]) {
  static_assert(N == 4 || N % 8 == 0, "8 or 16 bytes at a time");
  if constexpr (N == 4) {
    *reinterpret_cast<uint2 *>(to) = make_uint2(hp_packed(v), hp_packed(v + 2));
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 8) {
      *reinterpret_cast<uint4 *>(to + i) =
          make_uint4(hp_packed(v + i), hp_packed(v + i + 2), hp_packed(v + i + 4), hp_packed(v + i + 6));
    }
  }
}

/* The first `count` of N elements one by one, at any address; what is not there reads as `otherwise`, is not written. */
template <int N, typename A>
HP_FN void hp_load_some(const A *from, int64_t count, float (&v)[N], float otherwise = 0.0f) {
#pragma unroll
  for (int i = 0; i < N; i++) v[i] = i < count ? hp_get(from[i]) : otherwise;
}
template <int N, typename A>
HP_FN void hp_store_some(A *to, int64_t count, const float (&v)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) {
    if (i < count) hp_put(to + i, v[i]);
  }
}

/* ---- reductions: every thread gets the result --------------------------------------------------------------------- */
/* The larger one; a NaN wins, unlike with fmaxf. */
HP_FN float hp_max(float a, float b) { return (a > b) || (a != a) ? a : b; }

/* Over the 32 lanes of a warp, all of which must be here; T is float or double. */
template <typename T>
HP_FN T hp_warp_sum(T value) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}
HP_FN float hp_warp_max(float value) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) value = hp_max(value, __shfl_xor_sync(0xffffffffu, value, step));
  return value;
}

/* Over a block of any multiple of 32 threads; `room` is shared memory for 32 values, free again afterwards. */
template <typename T>
HP_FN T hp_block_sum(T value, T *room) {
  value = hp_warp_sum(value);
  if (hp_lane() == 0) room[hp_warp()] = value;
  __syncthreads();
  const T total = hp_warp_sum(hp_lane() < hp_threads() / 32 ? room[hp_lane()] : (T)0);
  __syncthreads();
  return total;
}
HP_FN float hp_block_max(float value, float *room) {
  value = hp_warp_max(value);
  if (hp_lane() == 0) room[hp_warp()] = value;
  __syncthreads();
  const float total = hp_warp_max(hp_lane() < hp_threads() / 32 ? room[hp_lane()] : -INFINITY);
  __syncthreads();
  return total;
}

/* ---- copies that run beside computation: 16 bytes from global to shared memory, both 16-byte aligned --------------- */
#ifndef HP_ON_HOST
HP_FN uint32_t hp_shared_address(const void *shared) { return (uint32_t)__cvta_generic_to_shared(shared); }
/* Where `there` is false nothing is read and 16 zero bytes are written. */
HP_FN void hp_copy_async(void *shared, const void *global, bool there = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(hp_shared_address(shared)), "l"(global),
               "r"(there ? 16 : 0)
               : "memory");
}
/* Ends a group of copies; hp_copy_wait<n> waits until at most the n last groups of this thread are not done. Other
 * threads see them after a __syncthreads(). */
HP_FN void hp_copy_commit(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
HP_FN void hp_copy_wait(void) {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* ---- tensor cores: a warp together; g = lane / 4, t = lane % 4 ----------------------------------------------------- */
/* Four 8x8 matrices of 16-bit elements: lane 8 i + r says where row r of matrix i begins (16-byte aligned, shared); v[i]
 * gets elements (g, 2t) and (g, 2t + 1) of matrix i, or, transposed, (2t, g) and (2t + 1, g). */
HP_FN void hp_ldmatrix4(uint32_t (&v)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(hp_shared_address(row))
               : "memory");
}
HP_FN void hp_ldmatrix4_transposed(uint32_t (&v)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(hp_shared_address(row))
               : "memory");
}
/* Two matrices; lanes 0 to 15 say where rows begin, the others' addresses are not used. */
HP_FN void hp_ldmatrix2(uint32_t (&v)[2], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(v[0]), "=r"(v[1])
               : "r"(hp_shared_address(row))
               : "memory");
}
HP_FN void hp_ldmatrix2_transposed(uint32_t (&v)[2], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(v[0]), "=r"(v[1])
               : "r"(hp_shared_address(row))
               : "memory");
}

/* d[16,8] += a[16,16] b[16,8], bfloat16 products, float32 sums. Pairs of neighbours, the lower index in the lower half:
 *   a[0] (g, 2t)  a[1] (g + 8, 2t)  a[2] (g, 2t + 8)  a[3] (g + 8, 2t + 8);   b[0] (2t, g)  b[1] (2t + 8, g), along k;
 *   d[0], d[1] (g, 2t), (g, 2t + 1)   d[2], d[3] (g + 8, 2t), (g + 8, 2t + 1). */
HP_FN void hp_mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
/* d[16,8] += a[16,8] b[8,8], TF32 products (hp_tf32_of), float32 sums:
 *   a[0] (g, t)  a[1] (g + 8, t)  a[2] (g, t + 4)  a[3] (g + 8, t + 4);   b[0] (t, g)  b[1] (t + 4, g);   d as above. */
HP_FN void hp_mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

/* ==== below this line: wrappers that the authors of kernels add ==================================================== */

/* ---- elements one after the other: for kernels that memory limits ------------------------------------------------- */
HP_FN float hp_nan(void) { return hp_float_of(0x7fc00000); }
HP_FN int64_t hp_smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Up to N elements from an aligned address: all of them in 16-byte accesses, fewer one by one. */
template <int N, typename A>
HP_FN void hp_load_upto(const A *from, int64_t count, float (&v)[N]) {
  if (count >= N) hp_load(from, v);
  else hp_load_some(from, count, v);
}
template <int N, typename A>
HP_FN void hp_store_upto(A *to, int64_t count, const float (&v)[N]) {
  if (count >= N) hp_store(to, v);
  else hp_store_some(to, count, v);
}

/* The same in rows: `whole` says that all of them are aligned and multiples of N long, `left` how much is left of this
 * one. */
template <int N, typename A>
HP_FN void hp_load_row(const A *from, bool whole, int64_t left, float (&v)[N]) {
  if (whole) hp_load(from, v);
  else hp_load_some(from, left, v);
}
template <int N, typename A>
HP_FN void hp_store_row(A *to, bool whole, int64_t left, const float (&v)[N]) {
  if (whole) hp_store(to, v);
  else hp_store_some(to, left, v);
}

/* body(e, count) for every N elements from e on, shared by all threads of the grid; the last may be fewer than N. */
template <int N, typename Body>
HP_FN void hp_each_vector(int64_t size, Body body) {
  const int64_t first = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, step = (int64_t)gridDim.x * blockDim.x;
  const int64_t whole = size / N;
#pragma unroll 2
  for (int64_t i = first; i < whole; i += step) body(i * N, (int64_t)N);
  if (first == 0 && whole * N < size) body(whole * N, size - whole * N);
}

/* 16 bytes of A as they lie in memory: a row kept in registers takes half the room in bfloat16. */
template <typename A>
struct hp_pack {
  uint32_t word[4];
};
template <typename A>
HP_FN hp_pack<A> hp_take(const A *from) {
  const uint4 q = *reinterpret_cast<const uint4 *>(from);
  return hp_pack<A>{{q.x, q.y, q.z, q.w}};
}
HP_FN hp_pack<float> hp_take_some(const float *from, int64_t count) {
  hp_pack<float> pack = {{0, 0, 0, 0}};
#pragma unroll
  for (int i = 0; i < 4; i++) pack.word[i] = i < count ? (uint32_t)hp_bits_of(from[i]) : 0;
  return pack;
}
HP_FN hp_pack<uint16_t> hp_take_some(const uint16_t *from, int64_t count) {
  hp_pack<uint16_t> pack = {{0, 0, 0, 0}};
#pragma unroll
  for (int i = 0; i < 8; i++) pack.word[i / 2] |= i < count ? (uint32_t)from[i] << 16 * (i & 1) : 0;
  return pack;
}
HP_FN void hp_spread(const hp_pack<float> &pack, float (&v)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] = hp_float_of((int32_t)pack.word[i]);
}
HP_FN void hp_spread(const hp_pack<uint16_t> &pack, float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 4; i++) hp_unpack(pack.word[i], v + 2 * i);
}

/* 2^x within 2 ulp; minus infinity gives 0, and a NaN stays one. */
HP_FN float hp_exp2(float x) {
#ifdef HP_ON_HOST
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

/* ---- eight and four bits: nearest even, saturating; a NaN is 0x7f, or the largest number where there is none ---------- */
/* A float as 1 sign, EXPONENT and MANTISSA bits, LARGEST the code of the largest number: in exact steps, for machines
 * without the instruction (before sm_89, e2m1: before sm_100) and the host. */
template <int EXPONENT, int MANTISSA, int LARGEST, int NOTHING>
HP_FN uint32_t hp_small_float_of(float value) {
  const int bias = (1 << (EXPONENT - 1)) - 1, drop = 23 - MANTISSA;
  const uint32_t bits = (uint32_t)hp_bits_of(value) & 0x7fffffffu;
  const uint32_t sign = ((uint32_t)hp_bits_of(value) >> 31) << (EXPONENT + MANTISSA);
  if (bits > 0x7f800000u) return NOTHING;
  if (bits < (uint32_t)(128 - bias) << 23) { /* subnormal: adding 2^23 last bits leaves their number, rounded */
    const uint32_t unit = (uint32_t)(128 - bias - MANTISSA + 23) << 23;
    return sign | ((uint32_t)hp_bits_of(hp_float_of((int32_t)bits) + hp_float_of((int32_t)unit)) - unit);
  }
  const uint32_t rounded = bits + ((1u << (drop - 1)) - 1u) + (bits >> drop & 1u);
  const uint32_t code = (rounded >> drop) - ((uint32_t)(127 - bias) << MANTISSA);
  return sign | (code < LARGEST ? code : LARGEST);
}
/* Two at a time, `low` in the lower byte (e2m1: in the lower four bits). */
HP_FN uint32_t hp_e4m3x2_of(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return hp_small_float_of<4, 3, 0x7e, 0x7f>(low) | hp_small_float_of<4, 3, 0x7e, 0x7f>(high) << 8;
#endif
}
HP_FN uint32_t hp_e5m2x2_of(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t pair;
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return hp_small_float_of<5, 2, 0x7b, 0x7f>(low) | hp_small_float_of<5, 2, 0x7b, 0x7f>(high) << 8;
#endif
}
HP_FN uint32_t hp_e2m1x2_of(float low, float high) {
#if defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM103_ALL)
  uint32_t pair;
  asm("{ .reg .b8 both; cvt.rn.satfinite.e2m1x2.f32 both, %1, %2; cvt.u32.u8 %0, both; }"
      : "=r"(pair)
      : "f"(high), "f"(low));
  return pair;
#else
  return hp_small_float_of<2, 1, 0x7, 0x7>(low) | hp_small_float_of<2, 1, 0x7, 0x7>(high) << 4;
#endif
}
/* What a code of e4m3 means that has no sign. */
HP_FN float hp_float_of_e4m3(uint32_t code) {
  const float subnormal = (float)code * 0.001953125f; /* 2^-9 */
  const float value = code < 8 ? subnormal : hp_float_of((int32_t)((code << 20) + (120u << 23)));
  return code == 0x7f ? hp_float_of(0x7fc00000) : value;
}

#endif
