/* cuda_on_host.h: enough of CUDA C++ that g++ compiles native/cuda/NAME.cu into a library whose kernels run on a CPU.
 *
 * For right and wrong, not for speed: the threads of a block are fibers (block.cpp) that run one after the other, in an
 * order that the caller chooses, from one barrier or warp instruction to the next. What PTX does behind a wrapper of
 * device.cuh is done here by the last lane that arrives, for all of its warp. What differs from a GPU: a lane's code is
 * not interleaved with another's between two such points, sums of a tensor core are exact before they are rounded.
 *
 * The one trick: __shared__ is a thread-local variable, so all of a library's shared memory is one piece (its TLS
 * segment) that can be poisoned before each block, also where the variable belongs to a template. */
#ifndef HPCPIPE_CUDA_ON_HOST_H
#define HPCPIPE_CUDA_ON_HOST_H
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <utility>

#define HP_ON_HOST 1
#ifndef HP_HOST_LISTING /* build.py finds the entries of a source by these two words, once macros are expanded */
#define __global__
#define __launch_bounds__(...)
#endif
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static __thread
#define HP_DYNAMIC_SHARED(type, name) type *const name = reinterpret_cast<type *>(hp_host_dynamic_shared)

/* ---- types -------------------------------------------------------------------------------------------------------- */
struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
#define HP_HOST_VECTORS(type, name)                                                             \
  struct __align__(2 * sizeof(type)) name##2 { type x, y; };                                    \
  struct name##3 { type x, y, z; };                                                             \
  struct __align__(sizeof(type) == 8 ? 16 : 4 * sizeof(type)) name##4 { type x, y, z, w; };     \
  static inline name##2 make_##name##2(type x, type y) { return {x, y}; }                       \
  static inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }            \
  static inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
HP_HOST_VECTORS(float, float)
HP_HOST_VECTORS(double, double)
HP_HOST_VECTORS(int, int)
HP_HOST_VECTORS(unsigned char, uchar)
HP_HOST_VECTORS(unsigned short, ushort)
struct __align__(8) uint2 { unsigned x, y; };
struct __align__(16) uint4 { unsigned x, y, z, w; };
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

/* ---- the running thread and its block (block.cpp) ------------------------------------------------------------------ */
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
extern unsigned char *hp_host_dynamic_shared;
static const int warpSize = 32;

/* Ends the launch with a sentence that names kernel, block and thread. */
[[noreturn]] void hp_host_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
void hp_host_barrier(void);
/* Waits until every lane of `mask` is here with the same `what`; the last one calls `combine` on the lanes' slots. */
typedef void (*hp_host_combine)(void *const *slots, uint32_t mask);
void hp_host_exchange(uint32_t mask, const char *what, hp_host_combine combine, void *slot);
void hp_host_copy_async(void *to, const void *from, bool there);
void hp_host_copy_commit(void);
void hp_host_copy_wait(int groups);

static inline void __syncthreads(void) { hp_host_barrier(); }
static inline void __syncwarp(uint32_t mask = 0xffffffffu) {
  hp_host_exchange(mask, "__syncwarp", [](void *const *, uint32_t) {}, nullptr);
}
static inline void __threadfence(void) {}
static inline void __threadfence_block(void) {}

/* ---- warp exchanges ------------------------------------------------------------------------------------------------ */
static inline int hp_host_lane(void) {
  return (int)((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) & 31);
}
struct hp_host_shuffle {
  int source;
  uint64_t in, out;
};
static inline void hp_host_shuffle_all(void *const *slots, uint32_t mask) {
  for (int lane = 0; lane < 32; lane++) {
    if (!(mask >> lane & 1)) continue;
    hp_host_shuffle *own = (hp_host_shuffle *)slots[lane];
    if (!(mask >> own->source & 1)) hp_host_fail("a shuffle reads lane %d, which its mask lacks", own->source);
    own->out = ((const hp_host_shuffle *)slots[own->source])->in;
  }
}
template <typename T>
static inline T hp_host_shuffled(uint32_t mask, const char *what, T value, int source) {
  static_assert(sizeof(T) <= 8, "a shuffle moves 4 or 8 bytes");
  hp_host_shuffle slot = {source, 0, 0};
  memcpy(&slot.in, &value, sizeof value);
  hp_host_exchange(mask, what, hp_host_shuffle_all, &slot);
  memcpy(&value, &slot.out, sizeof value);
  return value;
}
/* The lane to read; outside of its segment of `width` lanes a lane reads itself. */
template <typename T>
static inline T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
  const int lane = hp_host_lane();
  return hp_host_shuffled(mask, "__shfl_sync", value, (lane & ~(width - 1)) + (source & (width - 1)));
}
template <typename T>
static inline T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32) {
  const int lane = hp_host_lane(), source = lane ^ bits;
  return hp_host_shuffled(mask, "__shfl_xor_sync", value, source < (lane & ~(width - 1)) + width ? source : lane);
}
template <typename T>
static inline T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
  const int lane = hp_host_lane(), source = lane + (int)delta;
  return hp_host_shuffled(mask, "__shfl_down_sync", value, source < (lane & ~(width - 1)) + width ? source : lane);
}
template <typename T>
static inline T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
  const int lane = hp_host_lane(), source = lane - (int)delta;
  return hp_host_shuffled(mask, "__shfl_up_sync", value, source >= (lane & ~(width - 1)) ? source : lane);
}
struct hp_host_vote {
  int in;
  unsigned out;
};
static inline unsigned __ballot_sync(uint32_t mask, int predicate) {
  hp_host_vote slot = {predicate, 0};
  hp_host_exchange(mask, "__ballot_sync", [](void *const *slots, uint32_t lanes) {
    unsigned votes = 0;
    for (int i = 0; i < 32; i++) votes |= (lanes >> i & 1) && ((hp_host_vote *)slots[i])->in ? 1u << i : 0u;
    for (int i = 0; i < 32; i++) if (lanes >> i & 1) ((hp_host_vote *)slots[i])->out = votes;
  }, &slot);
  return slot.out;
}
static inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
static inline int __all_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

/* ---- intrinsics ---------------------------------------------------------------------------------------------------- */
template <typename To, typename From>
static inline To hp_host_bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To same;
  memcpy(&same, &value, sizeof same);
  return same;
}
static inline int __float_as_int(float x) { return hp_host_bits<int>(x); }
static inline unsigned __float_as_uint(float x) { return hp_host_bits<unsigned>(x); }
static inline float __int_as_float(int x) { return hp_host_bits<float>(x); }
static inline float __uint_as_float(unsigned x) { return hp_host_bits<float>(x); }
static inline long long __double_as_longlong(double x) { return hp_host_bits<long long>(x); }
static inline double __longlong_as_double(long long x) { return hp_host_bits<double>(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fadd_rn(float a, float b) {
  volatile float sum = a + b; /* not to be contracted */
  return sum;
}
static inline float __fmul_rn(float a, float b) {
  volatile float product = a * b;
  return product;
}
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline int __float2int_rn(float x) { return (int)rintf(x); }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
template <typename T> static inline T __ldg(const T *from) { return *from; }
template <typename T> static inline T __ldcs(const T *from) { return *from; }
template <typename T> static inline void __stcs(T *to, T value) { *to = value; }
template <typename T> static inline T min(T a, T b) {
  if constexpr (std::is_floating_point<T>::value) return fmin(a, b); else return b < a ? b : a;
}
template <typename T> static inline T max(T a, T b) {
  if constexpr (std::is_floating_point<T>::value) return fmax(a, b); else return a < b ? b : a;
}
/* Of integers alone: the order of blocks does not change what they add up to. */
template <typename T> static inline T atomicAdd(T *to, T value) {
  static_assert(std::is_integral<T>::value, "no floating-point atomics: their order would show");
  const T old = *to;
  *to = old + value;
  return old;
}
template <typename T> static inline T atomicMax(T *to, T value) {
  static_assert(std::is_integral<T>::value, "no floating-point atomics");
  const T old = *to;
  *to = old < value ? value : old;
  return old;
}

/* ---- the twins of device.cuh's wrappers of PTX --------------------------------------------------------------------- */
static inline void hp_copy_async(void *shared, const void *global, bool there = true) {
  hp_host_copy_async(shared, global, there);
}
static inline void hp_copy_commit(void) { hp_host_copy_commit(); }
template <int N>
static inline void hp_copy_wait(void) { hp_host_copy_wait(N); }

struct hp_host_rows {
  const uint16_t *row;
  uint32_t *v;
};
template <int COUNT, bool TRANSPOSED>
static inline void hp_host_ldmatrix(void *const *slots, uint32_t) {
  for (int lane = 0; lane < 32; lane++) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < COUNT; i++) {
      uint32_t pair = 0;
      for (int j = 0; j < 2; j++) {
        const int r = TRANSPOSED ? 2 * t + j : g, c = TRANSPOSED ? g : 2 * t + j;
        const hp_host_rows *from = (const hp_host_rows *)slots[8 * i + r];
        if ((uintptr_t)from->row % 16) hp_host_fail("ldmatrix: lane %d's row is not 16-byte aligned", 8 * i + r);
        pair |= (uint32_t)from->row[c] << (16 * j);
      }
      ((const hp_host_rows *)slots[lane])->v[i] = pair;
    }
  }
}
#define HP_HOST_LDMATRIX(name, count, transposed)                                              \
  static inline void name(uint32_t(&v)[count], const void *row) {                              \
    hp_host_rows slot = {(const uint16_t *)row, v};                                            \
    hp_host_exchange(0xffffffffu, #name, hp_host_ldmatrix<count, transposed>, &slot);          \
  }
HP_HOST_LDMATRIX(hp_ldmatrix4, 4, false)
HP_HOST_LDMATRIX(hp_ldmatrix4_transposed, 4, true)
HP_HOST_LDMATRIX(hp_ldmatrix2, 2, false)
HP_HOST_LDMATRIX(hp_ldmatrix2_transposed, 2, true)

struct hp_host_fragments {
  float *d;
  const uint32_t *a, *b;
};
static inline float hp_host_high(uint32_t word) { return hp_host_bits<float>(word); }
/* Element (row, k) of a and (k, column) of b out of the lanes' fragments; 16-bit elements lie two in a register. */
template <bool HALF>
static inline void hp_host_mma(void *const *slots, uint32_t) {
  const int depth = HALF ? 16 : 8, half = depth / 2, pack = HALF ? 2 : 1;
  float a[16][16], b[16][8];
  for (int k = 0; k < depth; k++) {
    const int t = k % half / pack, shift = HALF && k % 2 == 0 ? 16 : 0;
    const uint32_t keep = HALF ? 0xffff0000u : 0xffffe000u;
    for (int row = 0; row < 16; row++) {
      const hp_host_fragments *lane = (const hp_host_fragments *)slots[row % 8 * 4 + t];
      a[row][k] = hp_host_high(lane->a[row / 8 + 2 * (k / half)] << shift & keep);
    }
    for (int column = 0; column < 8; column++) {
      b[k][column] = hp_host_high(((const hp_host_fragments *)slots[column * 4 + t])->b[k / half] << shift & keep);
    }
  }
  for (int row = 0; row < 16; row++) {
    for (int column = 0; column < 8; column++) {
      float *d = ((const hp_host_fragments *)slots[row % 8 * 4 + column / 2])->d + row / 8 * 2 + column % 2;
      double sum = *d;
      for (int k = 0; k < depth; k++) sum += (double)a[row][k] * b[k][column];
      *d = (float)sum;
    }
  }
}
static inline void hp_mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  hp_host_fragments slot = {d, a, b};
  hp_host_exchange(0xffffffffu, "hp_mma_bfloat16", hp_host_mma<true>, &slot);
}
static inline void hp_mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  hp_host_fragments slot = {d, a, b};
  hp_host_exchange(0xffffffffu, "hp_mma_tf32", hp_host_mma<false>, &slot);
}

/* ---- entries: arguments come as an array of 8-byte slots ------------------------------------------------------------ */
/* One letter per argument: p an address, l an int64_t, f a float; no other type is used. */
template <typename T>
struct hp_host_argument {
  static_assert(std::is_pointer<T>::value || std::is_same<T, int64_t>::value || std::is_same<T, float>::value,
                "an entry takes addresses, int64_t and float");
  static const char letter = std::is_pointer<T>::value ? 'p' : std::is_same<T, float>::value ? 'f' : 'l';
  static T of(const uint64_t *slot) {
    T value;
    memcpy(&value, slot, sizeof value);
    return value;
  }
};
template <auto ENTRY>
struct hp_host_entry;
template <typename... P, void (*ENTRY)(P...)>
struct hp_host_entry<ENTRY> {
  static constexpr char letters[sizeof...(P) + 1] = {hp_host_argument<P>::letter..., 0};
  template <size_t... I>
  static void unpack(const uint64_t *args, std::index_sequence<I...>) { ENTRY(hp_host_argument<P>::of(args + I)...); }
  static void run(const uint64_t *args) { unpack(args, std::index_sequence_for<P...>()); }
};
struct hp_host_kernel {
  const char *name, *letters;
  int bound; /* the largest block, of __launch_bounds__; 1024 where there is none */
  void (*run)(const uint64_t *args);
};
/* Written by build.py at the end of each source; ends with a row of nulls. */
extern "C" __attribute__((visibility("default"))) const hp_host_kernel hp_host_kernels[];
#endif
