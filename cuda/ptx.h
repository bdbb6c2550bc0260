// The few instructions of NVIDIA's GPUs that CUDA C++ has no name for, or one with other rounding. The tests put a file
// of this name in its place, with the same functions in plain C++, to run kernels on the CPU.
#pragma once

#define SRU_PTX static __device__ __forceinline__

// ------------------------------------------------------------------------------------------------------------------
// Mathematics, on the special function unit; subnormal arguments and results count as 0.

SRU_PTX float exp2_approx(float x) {  // relative error 2^-22
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SRU_PTX float reciprocal_approx(float x) {  // one unit in the last place
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ------------------------------------------------------------------------------------------------------------------
// Loads of what no thread writes and no other reads, past the first-level cache; and stores of what is not read again
// soon. What lies beside a line, other warps read soon: it is fetched with it, so that memory is asked for more at
// once.

#if __CUDA_ARCH__ >= 800
#define SRU_WITH_NEIGHBOURS ".L2::256B"
#else
#define SRU_WITH_NEIGHBOURS ""
#endif
#define SRU_LOAD_ONCE(type, suffix, constraint)                                    \
  SRU_PTX type load_once(const type *p) {                                          \
    type a;                                                                        \
    asm("ld.global.nc.L1::no_allocate" SRU_WITH_NEIGHBOURS "." suffix " %0, [%1];" \
        : "=" constraint(a)                                                        \
        : "l"(__cvta_generic_to_global(p)));                                       \
    return a;                                                                      \
  }
#define SRU_LOAD_ONCE_2(type, suffix, constraint)                                           \
  SRU_PTX type load_once(const type *p) {                                                   \
    type a;                                                                                 \
    asm("ld.global.nc.L1::no_allocate" SRU_WITH_NEIGHBOURS ".v2." suffix " {%0, %1}, [%2];" \
        : "=" constraint(a.x), "=" constraint(a.y)                                          \
        : "l"(__cvta_generic_to_global(p)));                                                \
    return a;                                                                               \
  }
#define SRU_STORE_ONCE(type, suffix, constraint)                                                                    \
  SRU_PTX void store_once(type *p, type a) {                                                                        \
    asm volatile("st.global.cs." suffix " [%0], %1;" ::"l"(__cvta_generic_to_global(p)), constraint(a) : "memory"); \
  }
#define SRU_STORE_ONCE_2(type, suffix, constraint)                                                                 \
  SRU_PTX void store_once(type *p, type a) {                                                                       \
    asm volatile("st.global.cs.v2." suffix " [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), constraint(a.x), \
                 constraint(a.y)                                                                                   \
                 : "memory");                                                                                      \
  }
SRU_LOAD_ONCE(unsigned short, "u16", "h")
SRU_LOAD_ONCE(unsigned int, "u32", "r")
SRU_LOAD_ONCE(float, "f32", "f")
SRU_LOAD_ONCE(double, "f64", "d")
SRU_LOAD_ONCE_2(float2, "f32", "f")
SRU_LOAD_ONCE_2(double2, "f64", "d")
SRU_STORE_ONCE(unsigned short, "u16", "h")
SRU_STORE_ONCE(unsigned int, "u32", "r")
SRU_STORE_ONCE(float, "f32", "f")
SRU_STORE_ONCE(double, "f64", "d")
SRU_STORE_ONCE_2(float2, "f32", "f")
SRU_STORE_ONCE_2(double2, "f64", "d")
#undef SRU_LOAD_ONCE
#undef SRU_LOAD_ONCE_2
#undef SRU_STORE_ONCE
#undef SRU_STORE_ONCE_2

// The same loads, of bits, for what has to be under way before a barrier: no compiler moves them to behind it, as it
// may those above, to save registers.

#define SRU_LOAD_NOW(type, suffix, results, address, ...)                           \
  SRU_PTX type load_now(const type *p) {                                            \
    type a;                                                                         \
    asm volatile("ld.global.L1::no_allocate." suffix " " results ", [" address "];" \
                 : __VA_ARGS__                                                      \
                 : "l"(__cvta_generic_to_global(p))                                 \
                 : "memory");                                                       \
    return a;                                                                       \
  }
SRU_LOAD_NOW(unsigned short, "u16", "%0", "%1", "=h"(a))
SRU_LOAD_NOW(unsigned int, "u32", "%0", "%1", "=r"(a))
SRU_LOAD_NOW(uint2, "v2.u32", "{%0, %1}", "%2", "=r"(a.x), "=r"(a.y))
SRU_LOAD_NOW(uint4, "v4.u32", "{%0, %1, %2, %3}", "%4", "=r"(a.x), "=r"(a.y), "=r"(a.z), "=r"(a.w))
#undef SRU_LOAD_NOW

// ------------------------------------------------------------------------------------------------------------------
// Flags by which blocks tell each other what they have written. What a thread and, before a barrier, the others of its
// block have written is seen by whoever then sees the flag, and behind a barrier by the others of its warp or block.

SRU_PTX void release_flag(unsigned int *p, unsigned int value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "r"(value) : "memory");
}
SRU_PTX unsigned int acquire_flag(const unsigned int *p) {
  unsigned int value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(p)) : "memory");
  return value;
}

// ------------------------------------------------------------------------------------------------------------------
// A barrier of all threads of a block, which may wait at different lines, as those of one warp may.

SRU_PTX void meet() { asm volatile("barrier.sync 0;" ::: "memory"); }

// Where this warp stands in its multiprocessor, which gives neighbouring places to the warps of a block. Its remainder
// by 4 is the scheduler that has the warp.
SRU_PTX int place_of_warp() {
  int place;
  asm volatile("mov.u32 %0, %%warpid;" : "=r"(place));
  return place;
}

// ------------------------------------------------------------------------------------------------------------------
// Kernels that begin while the one before still runs (see sru_rt/dependent.py), from sm_90 on. Until it has waited for
// that one a kernel may only ask for lines to be brought to the second-level cache, which is the same for all: what
// others write meanwhile is found there. Once all blocks have let the next one begin, or have ended, it may.

SRU_PTX void prefetch_to_l2(const void *p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
}
#if __CUDA_ARCH__ >= 900
SRU_PTX void wait_for_the_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
SRU_PTX void let_the_next_kernel_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#else
SRU_PTX void wait_for_the_kernel_before() {}
SRU_PTX void let_the_next_kernel_begin() {}
#endif

// ------------------------------------------------------------------------------------------------------------------
// Copies from global to shared memory that a thread starts and need not wait for, from sm_80 on. Addresses are
// multiples of the bytes. Those started since the last cp_async_commit() are a group; cp_async_wait() waits for all of
// the thread's groups but the last few.

#define SRU_CP_ASYNC(bytes, cache)                                                             \
  SRU_PTX void cp_async_##bytes(void *shared, const void *global) {                            \
    asm volatile("cp.async." cache ".shared.global" SRU_WITH_NEIGHBOURS " [%0], [%1], " #bytes \
                 ";" ::"r"((unsigned)__cvta_generic_to_shared(shared)),                        \
                 "l"(__cvta_generic_to_global(global))                                         \
                 : "memory");                                                                  \
  }
SRU_CP_ASYNC(4, "ca")
SRU_CP_ASYNC(8, "ca")
SRU_CP_ASYNC(16, "cg")  // past the first-level cache
#undef SRU_CP_ASYNC
SRU_PTX void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int groups_to_leave>
SRU_PTX void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_to_leave) : "memory");
}

// ------------------------------------------------------------------------------------------------------------------
// Products of 16-bit numbers, from sm_80 on: sum += A B for A of 16 rows and 16 columns and B of 16 rows and 8 columns,
// by a warp, each of whose lanes has parts of all three. With g = lane / 4 and c = lane % 4, a pair of numbers stands
// at the columns 2*c and 2*c + 1 of A, or at these rows of B, or 8 further on. They are a[0] of row g, a[1] of row
// g + 8, a[2] of row g and 8 further on, a[3] of row g + 8 and 8 further on; b[0] of column g, b[1] of column g and 8
// further on. Of the sums, sum[0] and sum[1] are of row g at the columns 2*c and 2*c + 1, sum[2] and sum[3] of row
// g + 8.

#define SRU_MULTIPLY_ADD(name, type)                                                    \
  SRU_PTX void name(float *sum, const unsigned int *a, const unsigned int *b) {         \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));   \
  }
SRU_MULTIPLY_ADD(multiply_add_halves, "f16")
SRU_MULTIPLY_ADD(multiply_add_bfloats, "bf16")
#undef SRU_MULTIPLY_ADD

// ------------------------------------------------------------------------------------------------------------------
// 16-bit formats as bits; rounding is to nearest even. Of a pair, `low` is in the lower half, at the lower address.

SRU_PTX float half_to_float(unsigned short h) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
  return x;
}
SRU_PTX unsigned short float_to_half(float x) {
  unsigned short h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return h;
}
SRU_PTX float bfloat_to_float(unsigned short h) { return __uint_as_float((unsigned int)h << 16); }

#if __CUDA_ARCH__ >= 800
SRU_PTX unsigned short float_to_bfloat(float x) {
  unsigned short h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return h;
}
SRU_PTX unsigned int floats_to_halves(float low, float high) {
  unsigned int pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
SRU_PTX unsigned int floats_to_bfloats(float low, float high) {
  unsigned int pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
#else
SRU_PTX unsigned short float_to_bfloat(float x) {
  const unsigned int b = __float_as_uint(x);
  return x == x ? (b + 0x7fffu + ((b >> 16) & 1u)) >> 16 : 0x7fffu;
}
SRU_PTX unsigned int floats_to_halves(float low, float high) {
  return float_to_half(low) | (unsigned int)float_to_half(high) << 16;
}
SRU_PTX unsigned int floats_to_bfloats(float low, float high) {
  return float_to_bfloat(low) | (unsigned int)float_to_bfloat(high) << 16;
}
#endif
