// The names of CUDA C++ that kernels use, for g++. It stands before kernel text from which emulator.py has taken the
// `__shared__` declarations; see runtime.cpp for what it all means. Extend it as kernels need more.
#pragma once

#include "runtime.h"

typedef __SIZE_TYPE__ size_t;

#define __host__
#define __device__
#define __global__
#define __constant__ static
#define __grid_constant__
#define __launch_bounds__(...)  // emulator.py reads it
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(n) alignas(n)
#define EMU_FN static inline

// ---------------------------------------------------------------------------------------------------------------------
// Where a thread is

static const uint3 &threadIdx = emu::here.thread;
static const uint3 &blockIdx = emu::here.block;
static const dim3 &blockDim = emu::here.block_size;
static const dim3 &gridDim = emu::here.grid_size;
constexpr int warpSize = 32;

// ---------------------------------------------------------------------------------------------------------------------
// Vector types, with the alignment that they have on the GPU

#define EMU_VECTORS(T, name, alignment)                      \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };         \
  struct alignas(alignment) name##4 { T x, y, z, w; };       \
  EMU_FN name##2 make_##name##2(T x, T y) { return {x, y}; } \
  EMU_FN name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMU_VECTORS(short, short, 8)
EMU_VECTORS(unsigned short, ushort, 8)
EMU_VECTORS(int, int, 16)
EMU_VECTORS(unsigned int, uint, 16)
EMU_VECTORS(long long, longlong, 16)
EMU_VECTORS(unsigned long long, ulonglong, 16)
EMU_VECTORS(float, float, 16)
EMU_VECTORS(double, double, 16)
#undef EMU_VECTORS

// ---------------------------------------------------------------------------------------------------------------------
// Mathematics. NVRTC has each function for float and double under its plain name, as C++ has.

extern "C" void *memcpy(void *, const void *, size_t);
extern "C" void *memset(void *, int, size_t);

#define EMU_MATHS_1(name)          \
  extern "C" double name(double);  \
  extern "C" float name##f(float); \
  EMU_FN float name(float x) { return __builtin_##name##f(x); }
#define EMU_MATHS_2(name)                 \
  extern "C" double name(double, double); \
  extern "C" float name##f(float, float); \
  EMU_FN float name(float x, float y) { return __builtin_##name##f(x, y); }
EMU_MATHS_1(exp)
EMU_MATHS_1(exp2)
EMU_MATHS_1(expm1)
EMU_MATHS_1(log)
EMU_MATHS_1(log2)
EMU_MATHS_1(log1p)
EMU_MATHS_1(tanh)
EMU_MATHS_1(sqrt)
EMU_MATHS_1(fabs)
EMU_MATHS_1(floor)
EMU_MATHS_1(ceil)
EMU_MATHS_1(rint)
EMU_MATHS_1(trunc)
EMU_MATHS_2(pow)
EMU_MATHS_2(fmin)
EMU_MATHS_2(fmax)
EMU_MATHS_2(fmod)
EMU_MATHS_2(copysign)
#undef EMU_MATHS_1
#undef EMU_MATHS_2
extern "C" double fma(double, double, double);
extern "C" float fmaf(float, float, float);
EMU_FN float fma(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
extern "C" float ldexpf(float, int);
extern "C" double ldexp(double, int);
EMU_FN float ldexp(float x, int n) { return __builtin_ldexpf(x, n); }
EMU_FN float rsqrtf(float x) { return 1.0f / sqrtf(x); }
EMU_FN double rsqrt(double x) { return 1.0 / sqrt(x); }
EMU_FN float rsqrt(float x) { return rsqrtf(x); }
EMU_FN bool isnan(float x) { return __builtin_isnan(x); }
EMU_FN bool isnan(double x) { return __builtin_isnan(x); }
EMU_FN bool isinf(float x) { return __builtin_isinf(x); }
EMU_FN bool isinf(double x) { return __builtin_isinf(x); }
EMU_FN bool isfinite(float x) { return __builtin_isfinite(x); }
EMU_FN bool isfinite(double x) { return __builtin_isfinite(x); }
EMU_FN int abs(int x) { return __builtin_abs(x); }
EMU_FN float abs(float x) { return __builtin_fabsf(x); }
EMU_FN double abs(double x) { return __builtin_fabs(x); }

#define EMU_EXTREMES(T)                            \
  EMU_FN T min(T x, T y) { return y < x ? y : x; } \
  EMU_FN T max(T x, T y) { return x < y ? y : x; }
EMU_EXTREMES(int)
EMU_EXTREMES(unsigned int)
EMU_EXTREMES(long)
EMU_EXTREMES(unsigned long)
EMU_EXTREMES(long long)
EMU_EXTREMES(unsigned long long)
#undef EMU_EXTREMES
// A number rather than NaN, as on the GPU.
EMU_FN float min(float x, float y) { return __builtin_fminf(x, y); }
EMU_FN float max(float x, float y) { return __builtin_fmaxf(x, y); }
EMU_FN double min(double x, double y) { return __builtin_fmin(x, y); }
EMU_FN double max(double x, double y) { return __builtin_fmax(x, y); }

// Exact here; the GPU's have some error.
EMU_FN float __expf(float x) { return __builtin_expf(x); }
EMU_FN float __exp2f(float x) { return __builtin_exp2f(x); }
EMU_FN float __logf(float x) { return __builtin_logf(x); }
EMU_FN float __log2f(float x) { return __builtin_log2f(x); }
EMU_FN float __fdividef(float x, float y) { return __builtin_fabsf(y) > 0x1p126f && y - y == 0 ? x * 0.0f : x / y; }

// Rounded to nearest even, and never fused.
EMU_FN float __fadd_rn(float x, float y) { return x + y; }
EMU_FN float __fsub_rn(float x, float y) { return x - y; }
EMU_FN float __fmul_rn(float x, float y) { return x * y; }
EMU_FN float __fdiv_rn(float x, float y) { return x / y; }
EMU_FN float __frcp_rn(float x) { return 1.0f / x; }
EMU_FN float __fsqrt_rn(float x) { return __builtin_sqrtf(x); }
EMU_FN float __fmaf_rn(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
EMU_FN double __dadd_rn(double x, double y) { return x + y; }
EMU_FN double __dmul_rn(double x, double y) { return x * y; }
EMU_FN double __fma_rn(double x, double y, double z) { return __builtin_fma(x, y, z); }

// ---------------------------------------------------------------------------------------------------------------------
// Bits

#define EMU_BITS(name, To, From)                                \
  EMU_FN To name(From from) {                                   \
    static_assert(sizeof(To) == sizeof(From), "the same bits"); \
    To to;                                                      \
    __builtin_memcpy(&to, &from, sizeof to);                    \
    return to;                                                  \
  }
EMU_BITS(__float_as_int, int, float)
EMU_BITS(__float_as_uint, unsigned int, float)
EMU_BITS(__int_as_float, float, int)
EMU_BITS(__uint_as_float, float, unsigned int)
EMU_BITS(__double_as_longlong, long long, double)
EMU_BITS(__longlong_as_double, double, long long)
#undef EMU_BITS
EMU_FN int __popc(unsigned int x) { return __builtin_popcount(x); }
EMU_FN int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
EMU_FN int __clz(int x) { return x ? __builtin_clz(x) : 32; }
EMU_FN int __ffs(int x) { return __builtin_ffs(x); }
EMU_FN unsigned int __brev(unsigned int x) {
  unsigned int y = 0;
  for (int i = 0; i < 32; i++) y |= (x >> i & 1) << (31 - i);
  return y;
}

// ---------------------------------------------------------------------------------------------------------------------
// Waiting for others, and exchange within a warp

#define EMU_SITE emu::Site site = {__builtin_FILE(), __builtin_LINE()}

EMU_FN void __syncthreads(EMU_SITE) { emu::barrier(site, false); }
EMU_FN int __syncthreads_count(int p, EMU_SITE) { return emu::barrier(site, p).nonzero; }
EMU_FN int __syncthreads_or(int p, EMU_SITE) { return emu::barrier(site, p).nonzero != 0; }
EMU_FN int __syncthreads_and(int p, EMU_SITE) {
  const emu::Votes votes = emu::barrier(site, p);
  return votes.nonzero == votes.threads;
}
EMU_FN void __syncwarp(unsigned int mask = ~0u, EMU_SITE) {
  emu::exchange(site, {emu::WarpOp::sync, mask}, nullptr, nullptr, 0);
}

namespace emu {
template <class T>
T shuffle(Site site, WarpCall call, T value) {
  static_assert(sizeof(T) <= 16 && __is_trivially_copyable(T), "a number, or a vector of numbers");
  T result;
  exchange(site, call, &value, &result, sizeof value);
  return result;
}
}  // namespace emu
template <class T>
EMU_FN T __shfl_sync(unsigned int mask, T value, int lane, int width = 32, EMU_SITE) {
  return emu::shuffle(site, {emu::WarpOp::shuffle, mask, lane, width}, value);
}
template <class T>
EMU_FN T __shfl_up_sync(unsigned int mask, T value, unsigned int by, int width = 32, EMU_SITE) {
  return emu::shuffle(site, {emu::WarpOp::shuffle_up, mask, int(by), width}, value);
}
template <class T>
EMU_FN T __shfl_down_sync(unsigned int mask, T value, unsigned int by, int width = 32, EMU_SITE) {
  return emu::shuffle(site, {emu::WarpOp::shuffle_down, mask, int(by), width}, value);
}
template <class T>
EMU_FN T __shfl_xor_sync(unsigned int mask, T value, int by, int width = 32, EMU_SITE) {
  return emu::shuffle(site, {emu::WarpOp::shuffle_xor, mask, by, width}, value);
}
EMU_FN unsigned int __ballot_sync(unsigned int mask, int p, EMU_SITE) {
  return emu::vote(site, {emu::WarpOp::ballot, mask}, p);
}
EMU_FN int __any_sync(unsigned int mask, int p, EMU_SITE) { return emu::vote(site, {emu::WarpOp::any, mask}, p); }
EMU_FN int __all_sync(unsigned int mask, int p, EMU_SITE) { return emu::vote(site, {emu::WarpOp::all, mask}, p); }

EMU_FN void __threadfence() { emu::fence(); }
EMU_FN void __threadfence_block() { emu::fence(); }
EMU_FN void __threadfence_system() { emu::fence(); }
EMU_FN void __nanosleep(unsigned int) { emu::let_others_run(); }
[[noreturn]] EMU_FN void __trap(EMU_SITE) { emu::fail(site, "__trap"); }

// ---------------------------------------------------------------------------------------------------------------------
// Memory

template <class T>
EMU_FN T __ldg(const T *p, EMU_SITE) {
  emu::check_address(site, p, alignof(T), emu::Space::global);
  return *p;
}
template <class T>
EMU_FN T __ldcs(const T *p, EMU_SITE) {
  return __ldg(p, site);
}
template <class T>
EMU_FN void __stcs(T *p, T value, EMU_SITE) {
  emu::check_address(site, p, alignof(T), emu::Space::global);
  *p = value;
}

namespace emu {
// Replaces *p by change(*p), and returns what was there.
template <class T, class Change>
T update(T *p, Change change) {
  T old, changed;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do changed = change(old);
  while (!__atomic_compare_exchange(p, &old, &changed, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
}  // namespace emu
template <class T>
EMU_FN T atomicAdd(T *p, T value) {
  return emu::update(p, [=](T old) { return old + value; });
}
template <class T>
EMU_FN T atomicSub(T *p, T value) {
  return emu::update(p, [=](T old) { return old - value; });
}
template <class T>
EMU_FN T atomicMin(T *p, T value) {
  return emu::update(p, [=](T old) { return value < old ? value : old; });
}
template <class T>
EMU_FN T atomicMax(T *p, T value) {
  return emu::update(p, [=](T old) { return old < value ? value : old; });
}
template <class T>
EMU_FN T atomicOr(T *p, T value) {
  return emu::update(p, [=](T old) { return old | value; });
}
template <class T>
EMU_FN T atomicAnd(T *p, T value) {
  return emu::update(p, [=](T old) { return old & value; });
}
template <class T>
EMU_FN T atomicExch(T *p, T value) {
  return emu::update(p, [=](T) { return value; });
}
template <class T>
EMU_FN T atomicCAS(T *p, T expected, T value) {
  __atomic_compare_exchange(p, &expected, &value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
EMU_FN unsigned int atomicInc(unsigned int *p, unsigned int last) {
  return emu::update(p, [=](unsigned int old) { return old >= last ? 0u : old + 1; });
}

namespace emu {
// What emulator.py puts in place of `__shared__ T name;`. Each declaration gives a lambda of its own, and so does each
// instance of a template that holds one.
template <class Unique>
struct Key {
  static char value;
};
template <class Unique>
char Key<Unique>::value;
template <class T, class Unique>
T &shared(Unique, const char *name) {
  return *(T *)shared_memory(&Key<Unique>::value, name, sizeof(T), alignof(T));
}
// `extern __shared__ T name[];`
template <class T>
T *dynamic_shared(EMU_SITE) {
  return (T *)dynamic_shared_memory(site);
}

// ---------------------------------------------------------------------------------------------------------------------
// Entry points

template <class... A>
struct Call {
  template <class F>
  explicit Call(F kernel, A... arguments) {
    kernel(arguments...);
  }
};
template <auto kernel>
struct Entry;
template <class... A, void (*kernel)(A...)>
struct Entry<kernel> {
  static constexpr size sizes[] = {sizeof(A)..., 0};
  static void run(void **arguments) {
    [[maybe_unused]] int i = 0;
    (void)Call<A...>{kernel, *(const A *)arguments[i++]...};  // braces fix the order
  }
  static constexpr Kernel named(const char *name, int most_threads = 0) {
    return {name, run, sizeof...(A), sizes, most_threads};
  }
};
}  // namespace emu
