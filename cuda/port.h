// What every file here is written over, in the form for the machine at hand: number types, loads and stores, and
// element-wise mathematics on `real`, a pack of neighbouring channels that behaves like one number.
#pragma once

// An array of `n` values where C++ allows no array of none.
#define SRU_AT_LEAST_ONE(n) ((n) > 0 ? (n) : 1)

using index_t = long long;

// Types of arrays in memory. `acc` is the type in which the state is carried and everything is computed.
struct float16 {
  unsigned short bits;
};
struct bfloat16 {
  unsigned short bits;
};

template <class T>
struct Storage {
  typedef float acc;
};
template <>
struct Storage<double> {
  typedef double acc;
};

#if defined(__CUDACC__)
#include "port_gpu.h"
#else
#include "port_cpu.h"
#endif

template <class Real>
SRU_FN Real minimum(Real a, Real b) {  // NaN in either argument gives NaN
  return where(a <= b, a, where(a != a, a, b));
}
template <class Real>
SRU_FN Real maximum(Real a, Real b) {
  return where(a >= b, a, where(a != a, a, b));
}
template <class Real>
SRU_FN Real relu(Real a) {
  return where(a < Real(0), Real(0), a);
}
// log(1 + t) for t from 0 to 1, given s = t / (2 + t): it is 2 atanh(s). For float32, by a series that is fitted to s
// from 0 to 1/3, with a relative error of 4e-9.
template <class Real>
SRU_FN Real log1p_series(Real s) {
  const Real q = s * s;
  Real p = fma(Real(0.28157779574394226), q, Real(0.27965158224105835));
  p = fma(p, q, Real(0.4002459645271301));
  p = fma(p, q, Real(0.6666632294654846));
  return s * fma(p, q, Real(2));
}
template <class Real>
SRU_FN Real sigmoid(Real x) {
  return quotient(Real(1), exp_plus(-x, Real(1)));
}
// sigmoid(a*b + c), of which a port may have one of its own.
template <class Real>
SRU_FN Real sigmoid_fma(Real a, Real b, Real c) {
  return sigmoid(fma(a, b, c));
}
// sigmoid(softplus(x) - softplus(y)), which is (1 + e^x) / (2 + e^x + e^y), by two exponentials and a quotient. Where
// both are so large that the ones do not count, x - y alone does, so both are brought down as far as that holds. All is
// multiplied by e^-max(x, 0) e^-max(y, 0), of which one factor then is no less than e^-enough.
template <class Real>
SRU_FN Real softplus_share(Real x, Real y) {
  const Real enough = sizeof(typename Real::scalar) == 4 ? 18 : 40;
  const Real excess = at_least(at_most(x, y) - enough, Real(0));
  x = x - excess, y = y - excess;
  const Real p = exp_plus(-absolute(x), Real(0)), q = exp_plus(-absolute(y), Real(0));
  const Real of_x = where(x < Real(0), Real(1), p), of_y = where(y < Real(0), Real(1), q);
  const Real a = fma(p, of_y, of_y), b = fma(q, of_x, of_x);
  return quotient(a, a + b);
}
