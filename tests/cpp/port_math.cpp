// Exports the element-wise mathematics of port.h on arrays, for tests/test_port.py.
#include "port.h"

template <class T>
using Pack = Vec<T, SRU_VECTOR_BYTES / sizeof(T)>;

#define UNARY(name)                                                                              \
  template <class T>                                                                             \
  static void apply_##name(const T *x, T *y, index_t n) {                                        \
    for (index_t i = 0; i < n; i += Pack<T>::width) {                                            \
      const int part = n - i < Pack<T>::width ? int(n - i) : Pack<T>::width;                     \
      store_part(y + i, name(load_part<Pack<T>>(x + i, part)), part);                            \
    }                                                                                            \
  }                                                                                              \
  SRU_EXPORT void name##_float32(const float *x, float *y, index_t n) { apply_##name(x, y, n); } \
  SRU_EXPORT void name##_float64(const double *x, double *y, index_t n) { apply_##name(x, y, n); }

UNARY(exp)
UNARY(log)
UNARY(sqrt)
UNARY(tanh)
UNARY(sigmoid)
UNARY(softplus)
UNARY(relu)

#define CONVERT(name)                                                                \
  SRU_EXPORT void load_##name(const name *x, float *y, index_t n) {                  \
    for (index_t i = 0; i < n; i += Pack<float>::width) {                            \
      const int part = n - i < Pack<float>::width ? int(n - i) : Pack<float>::width; \
      store_part(y + i, load_part<Pack<float>>(x + i, part), part);                  \
    }                                                                                \
  }                                                                                  \
  SRU_EXPORT void store_##name(const float *x, name *y, index_t n) {                 \
    for (index_t i = 0; i < n; i += Pack<float>::width) {                            \
      const int part = n - i < Pack<float>::width ? int(n - i) : Pack<float>::width; \
      store_part(y + i, load_part<Pack<float>>(x + i, part), part);                  \
    }                                                                                \
  }

CONVERT(float16)
CONVERT(bfloat16)

template <class T>
static void minimum_maximum(const T *a, const T *b, T *low, T *high, index_t n) {
  for (index_t i = 0; i < n; i += Pack<T>::width) {
    const int part = n - i < Pack<T>::width ? int(n - i) : Pack<T>::width;
    const Pack<T> x = load_part<Pack<T>>(a + i, part), y = load_part<Pack<T>>(b + i, part);
    store_part(low + i, minimum(x, y), part);
    store_part(high + i, maximum(x, y), part);
  }
}
SRU_EXPORT void minimum_maximum_float32(const float *a, const float *b, float *low, float *high, index_t n) {
  minimum_maximum(a, b, low, high, n);
}
