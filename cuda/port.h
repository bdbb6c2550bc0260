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
template <class Real>
SRU_FN Real absolute(Real a) {
  return where(a < Real(0), -a, a);
}
