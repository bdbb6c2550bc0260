// In place of cuda/ptx.h: the same functions, with the same meaning, in C++.
#pragma once

#define SRU_PTX static inline

namespace emu {
// Instructions marked .ftz take subnormal numbers for zeros of their sign.
EMU_FN float flush(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }
}  // namespace emu

SRU_PTX float exp2_approx(float x) { return emu::flush(__builtin_exp2f(emu::flush(x))); }
SRU_PTX float reciprocal_approx(float x) { return emu::flush(1.0f / emu::flush(x)); }

#define EMU_ONCE(T)                                                    \
  SRU_PTX T load_once(const T *p, EMU_SITE) { return __ldg(p, site); } \
  SRU_PTX void store_once(T *p, T value, EMU_SITE) { __stcs(p, value, site); }
EMU_ONCE(unsigned short)
EMU_ONCE(unsigned int)
EMU_ONCE(float)
EMU_ONCE(double)
EMU_ONCE(uint2)
EMU_ONCE(uint4)
EMU_ONCE(float2)
EMU_ONCE(float4)
EMU_ONCE(double2)
#undef EMU_ONCE

#define EMU_NOW(T) \
  SRU_PTX T load_now(const T *p, EMU_SITE) { return __ldg(p, site); }
EMU_NOW(unsigned short)
EMU_NOW(unsigned int)
EMU_NOW(uint2)
EMU_NOW(uint4)
#undef EMU_NOW

// ---------------------------------------------------------------------------------------------------------------------
// Flags between blocks

SRU_PTX void release_flag(unsigned int *p, unsigned int value, EMU_SITE) {
  emu::check_address(site, p, alignof(unsigned int), emu::Space::global);
  __atomic_store_n(p, value, __ATOMIC_RELEASE);
}
SRU_PTX unsigned int acquire_flag(const unsigned int *p, EMU_SITE) {
  emu::check_address(site, p, alignof(unsigned int), emu::Space::global);
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernels run one after another here

SRU_PTX void prefetch_to_l2(const void *) {}
SRU_PTX void wait_for_the_kernel_before() {}
SRU_PTX void let_the_next_kernel_begin() {}

// ---------------------------------------------------------------------------------------------------------------------
// A barrier that has no line of its own

SRU_PTX void meet() { emu::barrier({"barrier.sync", 0}, false); }
SRU_PTX int place_of_warp() { return emu::place_of_warp(); }

// ---------------------------------------------------------------------------------------------------------------------
// 16-bit formats

SRU_PTX float half_to_float(unsigned short h) {
  const unsigned int sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, fraction = h & 0x3ff;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
  const float magnitude = float(fraction) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}

SRU_PTX unsigned short float_to_half(float x) {
  const unsigned int bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u;
  const float magnitude = __builtin_fabsf(x);
  if (x != x) return 0x7fff;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  // Adding this rounds to a multiple of the last place that a half of this size has, to nearest even.
  if (magnitude < 0x1p-14f) return sign | (__float_as_uint(magnitude + 0.5f) - __float_as_uint(0.5f));
  const unsigned int low = bits & 0x7fffffffu;
  return sign | (low - (112u << 23) + 0xfffu + (low >> 13 & 1)) >> 13;
}

SRU_PTX float bfloat_to_float(unsigned short h) { return __uint_as_float((unsigned int)h << 16); }

SRU_PTX unsigned short float_to_bfloat(float x) {
  const unsigned int b = __float_as_uint(x);
  return x == x ? (b + 0x7fffu + (b >> 16 & 1)) >> 16 : 0x7fffu;
}

SRU_PTX unsigned int floats_to_halves(float low, float high) {
  return float_to_half(low) | (unsigned int)float_to_half(high) << 16;
}
SRU_PTX unsigned int floats_to_bfloats(float low, float high) {
  return float_to_bfloat(low) | (unsigned int)float_to_bfloat(high) << 16;
}

// ---------------------------------------------------------------------------------------------------------------------
// mma.sync.m16n8k16: each lane takes the rows of A and columns of B that its four sums need from the lanes that have
// them.

namespace emu {
template <class Number>
void multiply_add(Site site, float *sum, const unsigned int *a, const unsigned int *b, Number number) {
  const int lane = (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32, pair = lane % 4;
  float rows[2][16], columns[2][16];
  const auto unpack = [&](unsigned int bits, float *to) {
    to[0] = number((unsigned short)bits), to[1] = number((unsigned short)(bits >> 16));
  };
  for (int c = 0; c < 4; c++) {
    const uint4 theirs = shuffle(site, {WarpOp::shuffle, ~0u, lane - pair + c}, uint4{a[0], a[1], a[2], a[3]});
    unpack(theirs.x, rows[0] + 2 * c), unpack(theirs.y, rows[1] + 2 * c);
    unpack(theirs.z, rows[0] + 2 * c + 8), unpack(theirs.w, rows[1] + 2 * c + 8);
  }
  for (int n = 0; n < 2; n++)
    for (int c = 0; c < 4; c++) {
      const uint2 theirs = shuffle(site, {WarpOp::shuffle, ~0u, (2 * pair + n) * 4 + c}, uint2{b[0], b[1]});
      unpack(theirs.x, columns[n] + 2 * c), unpack(theirs.y, columns[n] + 2 * c + 8);
    }
  for (int i = 0; i < 4; i++)
    for (int k = 0; k < 16; k++) sum[i] += rows[i / 2][k] * columns[i % 2][k];
}
}  // namespace emu

SRU_PTX void multiply_add_halves(float *sum, const unsigned int *a, const unsigned int *b, EMU_SITE) {
  emu::multiply_add(site, sum, a, b, half_to_float);
}
SRU_PTX void multiply_add_bfloats(float *sum, const unsigned int *a, const unsigned int *b, EMU_SITE) {
  emu::multiply_add(site, sum, a, b, bfloat_to_float);
}

// ---------------------------------------------------------------------------------------------------------------------
// cp.async

namespace emu {
template <int bytes>
struct alignas(bytes) Bytes {
  unsigned int words[bytes / 4];
};
EMU_FN void move(const Copy &copy) {
  if (copy.bytes == 4) *(Bytes<4> *)copy.to = *(const Bytes<4> *)copy.from;
  if (copy.bytes == 8) *(Bytes<8> *)copy.to = *(const Bytes<8> *)copy.from;
  if (copy.bytes == 16) *(Bytes<16> *)copy.to = *(const Bytes<16> *)copy.from;
}
EMU_FN void copy_async(Site site, const Copy &copy) {
  if (start_copy(site, copy)) move(copy);
}
}  // namespace emu

SRU_PTX void cp_async_4(void *shared, const void *global, EMU_SITE) { emu::copy_async(site, {shared, global, 4, 0}); }
SRU_PTX void cp_async_8(void *shared, const void *global, EMU_SITE) { emu::copy_async(site, {shared, global, 8, 0}); }
SRU_PTX void cp_async_16(void *shared, const void *global, EMU_SITE) { emu::copy_async(site, {shared, global, 16, 0}); }
SRU_PTX void cp_async_commit() { emu::commit_copies(); }
template <int groups_to_leave>
SRU_PTX void cp_async_wait() {
  emu::Copy copy;
  while (emu::next_copy(groups_to_leave, &copy)) emu::move(copy);
}
