// The GPU's part of port.h: `real` is Vec<T, W>, the W channels of one thread.
//
// Kernels are compiled with --fmad=false: where a product and a sum are fused, the text says fma(). So all kernels
// round alike, however they arrange the work. Nothing of CUDA's headers is needed.
#pragma once

#include "ptx.h"

#define SRU_FN static __device__ __forceinline__
#define SRU_MEMBER __device__ __forceinline__

// ------------------------------------------------------------------------------------------------------------------
// Packs of channels

template <int W>
struct Mask {
  bool v[W];
};

template <class T, int W>
struct Vec {
  typedef T scalar;
  static constexpr int width = W;

  T v[W];

  Vec() = default;
  SRU_MEMBER Vec(double x) {
    for (int i = 0; i < W; i++) v[i] = T(x);
  }

  template <class F>
  SRU_FN Vec map(F f, Vec a) {
    for (int i = 0; i < W; i++) a.v[i] = f(a.v[i]);
    return a;
  }
  template <class F>
  SRU_FN Vec map(F f, Vec a, Vec b) {
    for (int i = 0; i < W; i++) a.v[i] = f(a.v[i], b.v[i]);
    return a;
  }
  template <class F>
  SRU_FN Mask<W> compare(F f, Vec a, Vec b) {
    Mask<W> m;
    for (int i = 0; i < W; i++) m.v[i] = f(a.v[i], b.v[i]);
    return m;
  }

  friend SRU_MEMBER Vec operator+(Vec a, Vec b) {
    return map([](T x, T y) { return x + y; }, a, b);
  }
  friend SRU_MEMBER Vec operator-(Vec a, Vec b) {
    return map([](T x, T y) { return x - y; }, a, b);
  }
  friend SRU_MEMBER Vec operator*(Vec a, Vec b) {
    return map([](T x, T y) { return x * y; }, a, b);
  }
  friend SRU_MEMBER Vec operator/(Vec a, Vec b) {
    return map([](T x, T y) { return x / y; }, a, b);
  }
  friend SRU_MEMBER Vec operator-(Vec a) {
    return map([](T x) { return -x; }, a);
  }
  friend SRU_MEMBER Vec absolute(Vec a) {
    return map([](T x) { return ::fabs(x); }, a);
  }
  // By one instruction each; the other one if either is NaN.
  friend SRU_MEMBER Vec at_most(Vec a, Vec b) {
    return map([](T x, T y) { return ::fmin(x, y); }, a, b);
  }
  friend SRU_MEMBER Vec at_least(Vec a, Vec b) {
    return map([](T x, T y) { return ::fmax(x, y); }, a, b);
  }
  friend SRU_MEMBER Mask<W> operator<(Vec a, Vec b) {
    return compare([](T x, T y) { return x < y; }, a, b);
  }
  friend SRU_MEMBER Mask<W> operator<=(Vec a, Vec b) {
    return compare([](T x, T y) { return x <= y; }, a, b);
  }
  friend SRU_MEMBER Mask<W> operator>(Vec a, Vec b) {
    return compare([](T x, T y) { return x > y; }, a, b);
  }
  friend SRU_MEMBER Mask<W> operator>=(Vec a, Vec b) {
    return compare([](T x, T y) { return x >= y; }, a, b);
  }
  friend SRU_MEMBER Mask<W> operator==(Vec a, Vec b) {
    return compare([](T x, T y) { return x == y; }, a, b);
  }
  friend SRU_MEMBER Mask<W> operator!=(Vec a, Vec b) {
    return compare([](T x, T y) { return x != y; }, a, b);
  }
  friend SRU_MEMBER Vec where(Mask<W> m, Vec a, Vec b) {
    for (int i = 0; i < W; i++) a.v[i] = m.v[i] ? a.v[i] : b.v[i];
    return a;
  }
  friend SRU_MEMBER Vec fma(Vec a, Vec b, Vec c) {
    for (int i = 0; i < W; i++) a.v[i] = ::fma(a.v[i], b.v[i], c.v[i]);
    return a;
  }
  friend SRU_MEMBER Vec sqrt(Vec a) {
    return map([](T x) { return ::sqrt(x); }, a);
  }
  friend SRU_MEMBER Vec exp(Vec a) {
    return map([](T x) { return ::exp(x); }, a);
  }
  friend SRU_MEMBER Vec log(Vec a) {
    return map([](T x) { return ::log(x); }, a);
  }
  friend SRU_MEMBER Vec tanh(Vec a) {
    return map([](T x) { return ::tanh(x); }, a);
  }
  // log(1 + exp(x)), without overflow and exact in both tails.
  friend SRU_MEMBER Vec softplus(Vec a) {
    const Vec x = map([](T x) { return x < T(0) ? T(0) : x; }, a);
    if constexpr (sizeof(T) == 8) {
      return x + map([](T x) { return ::log1p(::exp(x < T(0) ? x : -x)); }, a);
    } else {  // absolute error 1.5e-7, relative 4e-7 above -4 and 6e-8 times |x| below; 0 where exp(x) is below 2^-126
      const Vec t = map([](T x) { return exp2_approx((x < T(0) ? x : -x) * 1.44269504088896340736f); }, a);
      return x + log1p_series(t * map([](T t) { return reciprocal_approx(2.0f + t); }, t));
    }
  }

  // e^x + plus, and a / b. In float32 sigmoids are half of a gated cell's arithmetic, so they take the short way: an
  // absolute error of 2e-7, and 0 below 2^-126.
  friend SRU_MEMBER Vec exp_plus(Vec x, Vec plus) {
    return map([](T x, T plus) { return short_exp(x) + plus; }, x, plus);
  }
  friend SRU_MEMBER Vec quotient(Vec a, Vec b) {
    return map([](T a, T b) { return short_quotient(a, b); }, a, b);
  }
  // sigmoid(a*b + c). In float32 a and c are brought to powers of two before b is known, which often is a state that is
  // waited for.
  friend SRU_MEMBER Vec sigmoid_fma(Vec a, Vec b, Vec c) {
    if constexpr (sizeof(T) == 8) {
      return sigmoid(fma(a, b, c));
    } else {
      const Vec scale(-1.44269504088896340736f);
      const Vec power = fma(scale * a, b, scale * c);
      return map([](T x) { return reciprocal_approx(exp2_approx(x) + 1.0f); }, power);
    }
  }
  SRU_FN float short_exp(float x) { return exp2_approx(x * 1.44269504088896340736f); }
  SRU_FN double short_exp(double x) { return ::exp(x); }
  SRU_FN float short_quotient(float a, float b) { return a * reciprocal_approx(b); }
  SRU_FN double short_quotient(double a, double b) { return a / b; }
};

// ------------------------------------------------------------------------------------------------------------------
// Loads and stores

// W neighbouring elements of an array of T, as they are in memory.
template <class T, int W>
struct Words;
template <>
struct Words<float, 1> {
  typedef float type;
};
template <>
struct Words<float, 2> {
  typedef float2 type;
};
template <>
struct Words<double, 1> {
  typedef double type;
};
template <>
struct Words<double, 2> {
  typedef double2 type;
};
template <>
struct Words<float16, 1> {
  typedef unsigned short type;
};
template <>
struct Words<float16, 2> {
  typedef unsigned int type;
};
template <>
struct Words<bfloat16, 1> {
  typedef unsigned short type;
};
template <>
struct Words<bfloat16, 2> {
  typedef unsigned int type;
};

template <class T, int W>
struct Packed {
  typedef typename Words<T, W>::type words_type;
  words_type words;
};

// Addresses are multiples of the size of a pack.
template <class T, int W>
SRU_FN Packed<T, W> load_once_packed(const T *p) {
  return {load_once((const typename Words<T, W>::type *)p)};
}
template <class T, int W>
SRU_FN Packed<T, W> load_packed(const T *p) {
  return {*(const typename Words<T, W>::type *)p};
}
template <class T, int W>
SRU_FN void store_once(T *p, Packed<T, W> a) {
  store_once((typename Words<T, W>::type *)p, a.words);
}
template <class T, int W>
SRU_FN void store(T *p, Packed<T, W> a) {
  *(typename Words<T, W>::type *)p = a.words;
}

template <class T>
SRU_FN Vec<T, 1> widen(Packed<T, 1> a) {
  Vec<T, 1> x;
  x.v[0] = a.words;
  return x;
}
template <class T>
SRU_FN Vec<T, 2> widen(Packed<T, 2> a) {
  Vec<T, 2> x;
  x.v[0] = a.words.x, x.v[1] = a.words.y;
  return x;
}
SRU_FN Vec<float, 1> widen(Packed<float16, 1> a) {
  Vec<float, 1> x;
  x.v[0] = half_to_float(a.words);
  return x;
}
SRU_FN Vec<float, 2> widen(Packed<float16, 2> a) {
  Vec<float, 2> x;
  x.v[0] = half_to_float((unsigned short)a.words), x.v[1] = half_to_float((unsigned short)(a.words >> 16));
  return x;
}
SRU_FN Vec<float, 1> widen(Packed<bfloat16, 1> a) {
  Vec<float, 1> x;
  x.v[0] = bfloat_to_float(a.words);
  return x;
}
SRU_FN Vec<float, 2> widen(Packed<bfloat16, 2> a) {
  Vec<float, 2> x;
  x.v[0] = __uint_as_float(a.words << 16), x.v[1] = __uint_as_float(a.words & 0xffff0000u);
  return x;
}

template <class T>
struct Narrow {
  SRU_FN Packed<T, 1> from(Vec<T, 1> x) { return {x.v[0]}; }
  SRU_FN Packed<T, 2> from(Vec<T, 2> x) {
    Packed<T, 2> a;
    a.words.x = x.v[0], a.words.y = x.v[1];
    return a;
  }
};
template <>
struct Narrow<float16> {
  SRU_FN Packed<float16, 1> from(Vec<float, 1> x) { return {float_to_half(x.v[0])}; }
  SRU_FN Packed<float16, 2> from(Vec<float, 2> x) { return {floats_to_halves(x.v[0], x.v[1])}; }
};
template <>
struct Narrow<bfloat16> {
  SRU_FN Packed<bfloat16, 1> from(Vec<float, 1> x) { return {float_to_bfloat(x.v[0])}; }
  SRU_FN Packed<bfloat16, 2> from(Vec<float, 2> x) { return {floats_to_bfloats(x.v[0], x.v[1])}; }
};

template <class T, class Real>
SRU_FN Packed<T, Real::width> narrow(Real x) {
  return Narrow<T>::from(x);
}
