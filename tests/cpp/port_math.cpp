// Exports the mathematics and the conversions of port.h on arrays, for tests/test_port.py.
#include "port.h"

typedef float float32;
typedef double float64;

template <class T>
using Pack = Vec<T, SRU_VECTOR_BYTES / sizeof(T)>;

// y = f(x), whole packs first and then what is left, as the sweeps do.
template <class Real, class From, class To, class Function>
static void map(const From *x, To *y, index_t n, Function f) {
  index_t i = 0;
  for (; i + Real::width <= n; i += Real::width) store(y + i, f(load<Real>(x + i)));
  if (i < n) store_part(y + i, f(load_part<Real>(x + i, int(n - i))), int(n - i));
}

template <class Real, class T, class Function>
static void map_two(const T *a, const T *b, T *y, index_t n, Function f) {
  index_t i = 0;
  for (; i + Real::width <= n; i += Real::width) store(y + i, f(load<Real>(a + i), load<Real>(b + i)));
  const int rest = int(n - i);
  if (rest) store_part(y + i, f(load_part<Real>(a + i, rest), load_part<Real>(b + i, rest)), rest);
}

#define UNARY(name, T)                                                   \
  SRU_EXPORT void name##_##T(const T *x, T *y, index_t n) {              \
    map<Pack<T>>(x, y, n, [](Pack<T> a) -> Pack<T> { return name(a); }); \
  }
#define BINARY(name, T)                                                                       \
  SRU_EXPORT void name##_##T(const T *a, const T *b, T *y, index_t n) {                       \
    map_two<Pack<T>>(a, b, y, n, [](Pack<T> p, Pack<T> q) -> Pack<T> { return name(p, q); }); \
  }
#define MATHEMATICS(T) \
  UNARY(exp, T)        \
  UNARY(log, T)        \
  UNARY(sqrt, T)       \
  UNARY(tanh, T)       \
  UNARY(sigmoid, T)    \
  UNARY(softplus, T)   \
  UNARY(relu, T)       \
  BINARY(minimum, T)   \
  BINARY(maximum, T)   \
  BINARY(softplus_share, T)

MATHEMATICS(float32)
MATHEMATICS(float64)

#define CONVERSIONS(T)                                              \
  SRU_EXPORT void load_##T(const T *x, float32 *y, index_t n) {     \
    map<Pack<float32>>(x, y, n, [](Pack<float32> a) { return a; }); \
  }                                                                 \
  SRU_EXPORT void store_##T(const float32 *x, T *y, index_t n) {    \
    map<Pack<float32>>(x, y, n, [](Pack<float32> a) { return a; }); \
  }

CONVERSIONS(float16)
CONVERSIONS(bfloat16)

SRU_EXPORT int vector_bytes() { return SRU_VECTOR_BYTES; }
