// What CUDA source compiled under cuda_emu.h asks of the emulation; runtime.cpp answers. Like the kernels, it includes
// no standard header, so that they see no name that NVRTC would not give them.
#pragma once

struct uint3 {
  unsigned int x, y, z;
};
struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};

namespace emu {
typedef __SIZE_TYPE__ size;
typedef __UINTPTR_TYPE__ address;

// A place in the source, for messages.
struct Site {
  const char *file;
  int line;
};

// Who is running.
struct Position {
  uint3 thread, block;
  dim3 block_size, grid_size;
};
extern Position here;

// One kernel of a module: `run` is given pointers to its arguments, of these sizes. `most_threads` is what it says
// under __launch_bounds__, or 0.
struct Kernel {
  const char *name;
  void (*run)(void **);
  int n_arguments;
  const size *sizes;
  int most_threads;
};

// Stops the launch; it raises a RuntimeError with the message, the kernel, the block, the thread and the site.
[[noreturn]] void fail(Site, const char *format, ...) __attribute__((format(printf, 2, 3)));

// Waits for all threads of the block that have not returned.
struct Votes {
  int threads, nonzero;
};
Votes barrier(Site, bool predicate);

int place_of_warp();  // in a multiprocessor; another one with another order

// Waits for the lanes of `mask`. What each gives as `value` (`bytes` of it, at most 16) another gets as `result`.
enum class WarpOp { shuffle, shuffle_up, shuffle_down, shuffle_xor, ballot, any, all, sync };
struct WarpCall {
  WarpOp op;
  unsigned int mask;
  int argument = 0, width = 32;
};
void exchange(Site, WarpCall, const void *value, void *result, size bytes);
unsigned int vote(Site, WarpCall, bool predicate);

// The memory of one __shared__ variable in the block that is running. `key` tells variables apart.
void *shared_memory(const void *key, const char *name, size bytes, size alignment);
void *dynamic_shared_memory(Site);

// Checks an address that an instruction will access: its alignment, and the kind of memory that it must be in.
enum class Space { global, shared };
void check_address(Site, const void *, size alignment, Space);

// cp.async. The bytes are moved by the caller, so that the sanitizers see the accesses: at once where start_copy() says
// so, else those that next_copy() names, until it names none.
struct Copy {
  void *to;
  const void *from;
  int bytes, group;
};
bool start_copy(Site, Copy);
void commit_copies();
bool next_copy(int groups_to_leave, Copy *);

void fence();           // orders all memory accesses before it with those after any later fence
void let_others_run();  // for a thread that waits for a value in memory
}  // namespace emu
