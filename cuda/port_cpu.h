// The CPU's part of port.h: `real` is Vec<T, W>, W lanes of a vector register.
//
// The compiler may not contract (-ffp-contract=off): where a product and a sum are fused, the text says fma(). So
// float64 results are the same on every machine with fused multiply-add; those of float32 differ in the last bits with
// AVX-512, which has a sigmoid of its own.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define SRU_FN static inline __attribute__((always_inline))
#define SRU_MEMBER inline __attribute__((always_inline))
#define SRU_EXPORT extern "C" __attribute__((visibility("default")))

#if defined(__AVX512F__)
#define SRU_VECTOR_BYTES 64
#elif defined(__AVX__)
#define SRU_VECTOR_BYTES 32
#else
#define SRU_VECTOR_BYTES 16
#endif

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// ------------------------------------------------------------------------------------------------------------------
// Packs of lanes

// `vec` assumes its natural alignment; `in_memory` is the same pack at any address.
template <class T, int W>
struct Lanes {
  typedef T vec __attribute__((vector_size(sizeof(T) * W)));
  typedef T in_memory __attribute__((vector_size(sizeof(T) * W), aligned(sizeof(T)), may_alias));
};

// a*b + c with one rounding, where the machine has it. GCC has no portable spelling of it for packs: the product and
// the sum would have to be contracted, which -ffp-contract=off forbids everywhere else. Clang contracts within one
// expression alone (-ffp-contract=on), so there a*b + c says it.
#if defined(__FMA__) && !defined(__clang__)
#if defined(__AVX512F__)
SRU_FN Lanes<float, 16>::vec fused(Lanes<float, 16>::vec a, Lanes<float, 16>::vec b, Lanes<float, 16>::vec c) {
  return _mm512_fmadd_ps(a, b, c);
}
SRU_FN Lanes<double, 8>::vec fused(Lanes<double, 8>::vec a, Lanes<double, 8>::vec b, Lanes<double, 8>::vec c) {
  return _mm512_fmadd_pd(a, b, c);
}
#endif
SRU_FN Lanes<float, 8>::vec fused(Lanes<float, 8>::vec a, Lanes<float, 8>::vec b, Lanes<float, 8>::vec c) {
  return _mm256_fmadd_ps(a, b, c);
}
SRU_FN Lanes<double, 4>::vec fused(Lanes<double, 4>::vec a, Lanes<double, 4>::vec b, Lanes<double, 4>::vec c) {
  return _mm256_fmadd_pd(a, b, c);
}
#elif defined(__aarch64__) && !defined(__clang__)
SRU_FN Lanes<float, 4>::vec fused(Lanes<float, 4>::vec a, Lanes<float, 4>::vec b, Lanes<float, 4>::vec c) {
  return vfmaq_f32(c, a, b);
}
SRU_FN Lanes<double, 2>::vec fused(Lanes<double, 2>::vec a, Lanes<double, 2>::vec b, Lanes<double, 2>::vec c) {
  return vfmaq_f64(c, a, b);
}
#else
template <class Pack>
SRU_FN Pack fused(Pack a, Pack b, Pack c) {
  return a * b + c;
}
#endif

template <int bytes>
struct IntegerOf;
template <>
struct IntegerOf<2> {
  typedef int16_t type;
  typedef uint16_t unsigned_type;
};
template <>
struct IntegerOf<4> {
  typedef int32_t type;
  typedef uint32_t unsigned_type;
};
template <>
struct IntegerOf<8> {
  typedef int64_t type;
  typedef uint64_t unsigned_type;
};

template <class T, int W>
struct Vec {
  typedef T scalar;
  static constexpr int width = W;
  typedef typename Lanes<T, W>::vec vec;
  typedef typename IntegerOf<sizeof(T)>::unsigned_type bits_scalar;
  typedef typename Lanes<typename IntegerOf<sizeof(T)>::type, W>::vec mask;
  typedef typename Lanes<bits_scalar, W>::vec bits;

  vec v;

  SRU_MEMBER Vec() = default;
  SRU_MEMBER Vec(vec pack) : v(pack) {}
  // `x - 0` rather than `0 + x`: it keeps the sign of -0.
  SRU_MEMBER Vec(double x) : v(T(x) - vec{}) {}

  friend SRU_MEMBER Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend SRU_MEMBER Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend SRU_MEMBER Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  friend SRU_MEMBER Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  friend SRU_MEMBER Vec operator-(Vec a) { return -a.v; }
  friend SRU_MEMBER mask operator<(Vec a, Vec b) { return a.v < b.v; }
  friend SRU_MEMBER mask operator<=(Vec a, Vec b) { return a.v <= b.v; }
  friend SRU_MEMBER mask operator>(Vec a, Vec b) { return a.v > b.v; }
  friend SRU_MEMBER mask operator>=(Vec a, Vec b) { return a.v >= b.v; }
  friend SRU_MEMBER mask operator==(Vec a, Vec b) { return a.v == b.v; }
  friend SRU_MEMBER mask operator!=(Vec a, Vec b) { return a.v != b.v; }
  friend SRU_MEMBER Vec where(mask m, Vec a, Vec b) { return m ? a.v : b.v; }

  friend SRU_MEMBER Vec fma(Vec a, Vec b, Vec c) { return fused(a.v, b.v, c.v); }
  friend SRU_MEMBER Vec sqrt(Vec a) {
    Vec r;
    for (int i = 0; i < W; i++) r.v[i] = sizeof(T) == 4 ? __builtin_sqrtf(a.v[i]) : __builtin_sqrt(a.v[i]);
    return r;
  }
};

template <class Real>
SRU_FN typename Real::bits as_bits(Real a) {
  return (typename Real::bits)a.v;
}
template <class Real>
SRU_FN Real from_bits(typename Real::bits b) {
  return Real((typename Real::vec)b);
}

// ------------------------------------------------------------------------------------------------------------------
// Loads and stores

template <class Real>
SRU_FN Real load(const typename Real::scalar *p) {
  return Real(*(const typename Lanes<typename Real::scalar, Real::width>::in_memory *)p);
}
template <class Real>
SRU_FN void store(typename Real::scalar *p, Real a) {
  *(typename Lanes<typename Real::scalar, Real::width>::in_memory *)p = a.v;
}

template <class Real>
SRU_FN typename Real::bits load_half_words(const void *p) {
  typedef typename Lanes<uint16_t, Real::width>::vec halves;
  const halves h = *(const typename Lanes<uint16_t, Real::width>::in_memory *)p;
  return __builtin_convertvector(h, typename Real::bits);
}
template <class Real>
SRU_FN void store_half_words(void *p, typename Real::bits b) {
  typedef typename Lanes<uint16_t, Real::width>::vec halves;
  *(typename Lanes<uint16_t, Real::width>::in_memory *)p = __builtin_convertvector(b, halves);
}

// Stores past the caches, where the machine can; at addresses that are multiples of SRU_VECTOR_BYTES (or of the half,
// for 16-bit types). They are seen by other threads after finish_streaming().
template <class T, class Real>
SRU_FN void store_streaming(T *p, Real a) {
  store(p, a);
}
SRU_FN void finish_streaming() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}
#if defined(__AVX512F__)
SRU_FN void store_streaming(float *p, Vec<float, 16> a) { _mm512_stream_ps(p, a.v); }
SRU_FN void store_streaming(double *p, Vec<double, 8> a) { _mm512_stream_pd(p, a.v); }
#elif defined(__AVX__)
SRU_FN void store_streaming(float *p, Vec<float, 8> a) { _mm256_stream_ps(p, a.v); }
SRU_FN void store_streaming(double *p, Vec<double, 4> a) { _mm256_stream_pd(p, a.v); }
#endif

// bfloat16 is the upper half of a float32; rounding is to nearest even, and a NaN stays one.
template <class Real>
SRU_FN Real load(const bfloat16 *p) {
  return from_bits<Real>(load_half_words<Real>(p) << 16);
}
template <class Real>
SRU_FN void store(bfloat16 *p, Real a) {
  const typename Real::bits b = as_bits(a);
  const typename Real::bits rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  store_half_words<Real>(p, a == a ? rounded : (b >> 16) | 0x40u);
}

// float16 by integer arithmetic: the exponent is rebased by a multiplication (exact, subnormals included), infinities
// and NaNs are put back by hand.
template <class Real>
SRU_FN Real load(const float16 *p) {
  typedef typename Real::bits bits;
  const bits h = load_half_words<Real>(p);
  const bits magnitude = (h & 0x7fffu) << 13;
  const bits finite = as_bits(from_bits<Real>(magnitude) * Real(0x1p112));
  const bits wide = magnitude >= (bits{} + (0x7c00u << 13)) ? magnitude | 0x7f800000u : finite;
  return from_bits<Real>(wide | ((h & 0x8000u) << 16));
}
template <class Real>
SRU_FN void store(float16 *p, Real a) {
  typedef typename Real::bits bits;
  const bits b = as_bits(a), sign = (b >> 16) & 0x8000u, magnitude = b & 0x7fffffffu;
  // Subnormal results: adding 0.5 lets the floating-point adder round at the right bit.
  const bits small = as_bits(from_bits<Real>(magnitude) + Real(0.5)) - 0x3f000000u;
  const bits normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  bits h = magnitude < (bits{} + 0x38800000u) ? small : normal;
  h = magnitude >= (bits{} + 0x477ff000u) ? bits{} + 0x7c00u : h;  // rounds to 65536 or beyond: infinity
  h = magnitude > (bits{} + 0x7f800000u) ? bits{} + 0x7e00u : h;
  store_half_words<Real>(p, h | sign);
}

// Asks for the line of p[i], which may lie outside of an array, to read or to write it.
template <class T>
SRU_FN void prefetch(const T *p, index_t i) {
  __builtin_prefetch((const void *)((uintptr_t)p + i * index_t(sizeof(T))));
}
template <class T>
SRU_FN void prefetch_to_write(T *p, index_t i) {
  __builtin_prefetch((const void *)((uintptr_t)p + i * index_t(sizeof(T))), 1);
}

// The first `n` lanes alone, for the end of a row.
template <class Real, class T>
SRU_FN Real load_part(const T *p, int n) {
  T lanes[Real::width] = {};
  for (int i = 0; i < n; i++) lanes[i] = p[i];
  return load<Real>(lanes);
}
template <class Real, class T>
SRU_FN void store_part(T *p, Real a, int n) {
  T lanes[Real::width];
  store(lanes, a);
  for (int i = 0; i < n; i++) p[i] = lanes[i];
}

// ------------------------------------------------------------------------------------------------------------------
// Mathematics. Coefficients as in Cephes (Moshier) where a polynomial is not a plain Taylor series.

// min and max with a bound; NaN stays NaN.
template <class Real>
SRU_FN Real at_most(Real x, Real bound) {
  return where(x > bound, bound, x);
}
template <class Real>
SRU_FN Real at_least(Real x, Real bound) {
  return where(x < bound, bound, x);
}
// The instruction gives its second operand when either is NaN.
#if defined(__AVX512F__) && !defined(__clang__)
SRU_FN Vec<float, 16> at_most(Vec<float, 16> x, Vec<float, 16> bound) { return _mm512_min_ps(bound.v, x.v); }
SRU_FN Vec<float, 16> at_least(Vec<float, 16> x, Vec<float, 16> bound) { return _mm512_max_ps(bound.v, x.v); }
#elif defined(__AVX__) && !defined(__clang__)
SRU_FN Vec<float, 8> at_most(Vec<float, 8> x, Vec<float, 8> bound) { return _mm256_min_ps(bound.v, x.v); }
SRU_FN Vec<float, 8> at_least(Vec<float, 8> x, Vec<float, 8> bound) { return _mm256_max_ps(bound.v, x.v); }
#endif

template <class Real>
SRU_FN Real absolute(Real a) {
  typedef typename Real::bits bits;
  return from_bits<Real>(as_bits(a) & (~bits{} >> 1));
}

template <class Real>
SRU_FN Real polynomial(Real x, const double *coefficients, int n) {  // highest power first
  Real p = Real(coefficients[0]);
  for (int i = 1; i < n; i++) p = fma(p, x, Real(coefficients[i]));
  return p;
}

template <class T>
struct Format;
template <>
struct Format<float> {
  static constexpr int mantissa = 23, bias = 127;
  static constexpr double rounder = 0x1.8p23, ln2_high = 0.693359375, ln2_low = -2.12194440e-4;
  static constexpr double exp_low = -87.3, exp_high = 88.3, exp_zero = -103.98, exp_infinity = 88.72284;
};
template <>
struct Format<double> {
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double rounder = 0x1.8p52, ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr double exp_low = -708.3, exp_high = 709.0, exp_zero = -745.14, exp_infinity = 709.782712893384;
};

// e^r for |r| <= ln(2)/2
template <int W>
SRU_FN Vec<float, W> exp_reduced(Vec<float, W> r) {
  const double c[] = {1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3,
                      4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1};
  return fma(polynomial(r, c, 6), r * r, r) + Vec<float, W>(1);
}
template <int W>
SRU_FN Vec<double, W> exp_reduced(Vec<double, W> r) {
  const double c[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                      1.0 / 5040,       1.0 / 720,       1.0 / 120,      1.0 / 24,      1.0 / 6,      0.5};
  return fma(polynomial(r, c, 12), r * r, r) + Vec<double, W>(1);
}

// Splits x into n*ln(2) + r. The caller keeps n within int32; adding `rounder` rounds to the nearest integer.
template <class Real>
SRU_FN Real exp_split(Real x, Real &n) {
  typedef Format<typename Real::scalar> F;
  const Real shifted = fma(x, Real(1.44269504088896340736), Real(F::rounder));
  n = shifted - Real(F::rounder);
  return fma(n, Real(-F::ln2_low), fma(n, Real(-F::ln2_high), x));
}
// 2^n for an integer n whose result is a normal number.
template <class Real>
SRU_FN Real power_of_two(Real n) {
  typedef Format<typename Real::scalar> F;
  const typename Real::bits shifted = as_bits(n + Real(F::rounder + F::bias));
  return from_bits<Real>(shifted << F::mantissa);
}

// exp() where the caller does not mind the ends: arguments are clamped to what has a normal result. NaN stays NaN.
template <class Real>
SRU_FN Real exp_clamped(Real x) {
  typedef Format<typename Real::scalar> F;
  x = at_most(at_least(x, Real(F::exp_low)), Real(F::exp_high));
  Real n;
  const Real r = exp_split(x, n);
  return exp_reduced(r) * power_of_two(n);
}

template <class Real>
SRU_FN Real exp(Real x) {
  typedef Format<typename Real::scalar> F;
  const Real y = at_most(at_least(x, Real(F::exp_zero)), Real(F::exp_infinity));
  Real n;
  const Real r = exp_split(y, n);
  // In two factors, as 2^n alone may be subnormal or too large.
  const Real half = (fma(n, Real(0.5), Real(F::rounder))) - Real(F::rounder);
  const Real e = exp_reduced(r) * power_of_two(half) * power_of_two(n - half);
  return where(x > Real(F::exp_infinity), Real(__builtin_inf()), where(x < Real(F::exp_zero), Real(0), e));
}

// e^x + `plus`, for the sigmoid and its like; clamped like exp_clamped().
template <int W>
SRU_FN Vec<double, W> exp_plus(Vec<double, W> x, Vec<double, W> plus) {
  return exp_clamped(x) + plus;
}

// In float32 these bound the speed of a gated cell, so e^x takes the shortest way, 2^t with t = x*log2(e), whose
// rounding costs less than that of x itself. 2^t is 2^floor(t) or 2^round(t) times a minimax polynomial in the rest
// (relative error 7.5e-8). AVX-512 has instructions that take any t; elsewhere it is clamped.
template <int W>
SRU_FN Vec<float, W> exp_plus(Vec<float, W> x, Vec<float, W> plus) {
  typedef Vec<float, W> real;
  const double c[] = {0.001327647197931638, 0.009675541334206542, 0.05550713273542824,
                      0.24022119723848698,  0.6931469670647334,   1.0000000716546822};
  const real t = at_least(at_most(x * real(1.44269504088896340736), real(126)), real(-126));
  const real shifted = t + real(0x1.8p23 + 127), rest = t - (shifted - real(0x1.8p23 + 127));
  return fma(polynomial(rest, c, 6), from_bits<real>(as_bits(shifted) << 23), plus);
}
#if defined(__AVX512DQ__) && !defined(__clang__)
SRU_FN Vec<float, 16> exp_plus(Vec<float, 16> x, Vec<float, 16> plus) {
  typedef Vec<float, 16> real;
  const double c[] = {0.0018775766733615596, 0.008989340094732463, 0.05582631805001738,
                      0.24015361704534385,   0.6931530732000745,   0.9999999250635297};
  const real t = x * real(1.44269504088896340736);
  const real rest = _mm512_reduce_ps(t.v, 9);  // t - floor(t), and 0 for infinities
  return real(_mm512_scalef_ps(polynomial(rest, c, 6).v, t.v)) + plus;
}
#endif

template <class Real>
SRU_FN Real quotient(Real a, Real b) {
  return a / b;
}

// tanh(x) for |x| < 0.625, given z = x*x
template <int W>
SRU_FN Vec<float, W> tanh_small(Vec<float, W> x, Vec<float, W> z) {
  const double c[] = {-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1};
  return fma(polynomial(z, c, 5) * z, x, x);
}
template <int W>
SRU_FN Vec<double, W> tanh_small(Vec<double, W> x, Vec<double, W> z) {
  const double p[] = {-9.64399179425052238628e-1, -9.92877231001918586564e1, -1.61468768441708447952e3};
  const double q[] = {1.0, 1.12811678491632931402e2, 2.23548839060100448583e3, 4.84406305325125486048e3};
  return fma(polynomial(z, p, 3) / polynomial(z, q, 4) * z, x, x);
}
template <class Real>
SRU_FN Real tanh(Real x) {
  const Real a = absolute(x);
  const Real large = Real(1) - Real(2) / exp_plus(a + a, Real(1));
  return where(a < Real(0.625), tanh_small(x, x * x), where(x < Real(0), -large, large));
}

// log(1 + y) - y + y*y/2 for the mantissa 1 + y in [sqrt(1/2), sqrt(2))
template <int W>
SRU_FN Vec<float, W> log_tail(Vec<float, W> y, Vec<float, W> z) {
  const double c[] = {7.0376836292e-2,  -1.1514610310e-1, 1.1676998740e-1,  -1.2420140846e-1, 1.4249322787e-1,
                      -1.6668057665e-1, 2.0000714765e-1,  -2.4999993993e-1, 3.3333331174e-1};
  return polynomial(y, c, 9) * y * z;
}
template <int W>
SRU_FN Vec<double, W> log_tail(Vec<double, W> y, Vec<double, W> z) {
  const double p[] = {1.01875663804580931796e-4, 4.97494994976747001425e-1, 4.70579119878881725854e0,
                      1.44989225341610930846e1,  1.79368678507819816313e1,  7.70838733755885391666e0};
  const double q[] = {1.0,
                      1.12873587189167450590e1,
                      4.52279145837532221105e1,
                      8.29875266912776603211e1,
                      7.11544750618563894466e1,
                      2.31251620126765340583e1};
  return polynomial(y, p, 6) / polynomial(y, q, 6) * y * z;
}
template <class Real>
SRU_FN Real log(Real x) {
  typedef Format<typename Real::scalar> F;
  typedef typename Real::bits bits;
  const bits mantissa_bits = ((bits{} + 1) << F::mantissa) - 1;
  const auto subnormal = x < from_bits<Real>(mantissa_bits + 1);
  const bits b = as_bits(where(subnormal, x * Real(0x1p60), x));
  // x = m * 2^e with m in [1/2, 1), then in [sqrt(1/2), sqrt(2))
  Real m = from_bits<Real>((b & mantissa_bits) | as_bits(Real(0.5)));
  Real e = from_bits<Real>((b >> F::mantissa) | as_bits(Real(F::rounder))) - Real(F::rounder + (F::bias - 1));
  const auto low = m < Real(0.70710678118654752440);
  m = where(low, m + m, m);
  e = where(low, e - Real(1), e);
  e = where(subnormal, e - Real(60), e);
  const Real y = m - Real(1), z = y * y;
  Real r = fma(e, Real(F::ln2_low), log_tail(y, z));
  r = fma(e, Real(F::ln2_high), y + fma(z, Real(-0.5), r));
  r = where(x == Real(__builtin_inf()), x, r);
  r = where(x == Real(0), Real(-__builtin_inf()), r);
  return where(x >= Real(0), r, Real(__builtin_nan("")));
}

// log(1 + exp(x)), without overflow and exact in both tails, of which the left one ends in 0 where results are no
// normal numbers.
template <class Real>
SRU_FN Real softplus(Real x) {
  const Real a = -absolute(x);
  const Real t = where(a < Real(Format<typename Real::scalar>::exp_low), Real(0), exp_plus(a, Real(0)));
  if constexpr (sizeof(typename Real::scalar) == 4) return maximum(x, Real(0)) + log1p_series(t / (Real(2) + t));
  // log1p(t): the rounding error of 1 + t is divided out (Kahan).
  const Real u = Real(1) + t, l = where(u == Real(1), t, log(u) * (t / (u - Real(1))));
  return maximum(x, Real(0)) + l;
}
