// Stacks, and the switch from one to another. Each CUDA thread runs on a stack of its own.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>

// EMU_ASAN and EMU_TSAN say how the kernels are instrumented; the runtime itself never is.
#if defined(EMU_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(EMU_TSAN)
extern "C" {
void *__tsan_get_current_fiber();
void *__tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void *);
void __tsan_switch_to_fiber(void *, unsigned flags);
void __tsan_acquire(void *);
void __tsan_release(void *);
void __tsan_set_fiber_name(void *, const char *);
void AnnotateIgnoreReadsBegin(const char *, int);
void AnnotateIgnoreReadsEnd(const char *, int);
void AnnotateIgnoreWritesBegin(const char *, int);
void AnnotateIgnoreWritesEnd(const char *, int);
}
#endif

// Pushes what a function must keep, stores the stack pointer in *save, takes `load` for it, and pops the same.
extern "C" void emu_switch(void **save, void *load);
#if defined(__x86_64__)
__asm__(
    ".text\n.type emu_switch,@function\nemu_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n"
    ".size emu_switch, .-emu_switch\n");
constexpr int saved_words = 6;       // below the return address
constexpr int words_above_them = 2;  // the return address, and what keeps the stack aligned as after a call
constexpr int return_word = 6;
#elif defined(__aarch64__)  // tried under QEMU only
__asm__(
    ".text\n.type emu_switch,%function\nemu_switch:\n"
    "sub sp, sp, #160\n"
    "stp x19, x20, [sp]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\nstp x25, x26, [sp, #48]\n"
    "stp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\n"
    "stp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\nstp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\n"
    "mov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
    "ldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\nldp x25, x26, [sp, #48]\n"
    "ldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\n"
    "ldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\nldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\n"
    "add sp, sp, #160\nret\n"
    ".size emu_switch, .-emu_switch\n");
constexpr int saved_words = 20;
constexpr int words_above_them = 0;
constexpr int return_word = 11;  // x30
#else
#error "the CUDA emulation knows how to switch stacks on x86-64 and 64-bit ARM only"
#endif

namespace emu {

// Hides what the runtime does through functions that ThreadSanitizer intercepts, and makes it forget the accesses to
// memory that is mapped anew.
struct Unobserved {
#if defined(EMU_TSAN)
  Unobserved() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Unobserved() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
#else
  Unobserved() {}
#endif
};

// What happened before release(p) happens before what follows acquire(p), to ThreadSanitizer.
inline void release([[maybe_unused]] void *p) {
#if defined(EMU_TSAN)
  __tsan_release(p);
#endif
}
inline void acquire([[maybe_unused]] void *p) {
#if defined(EMU_TSAN)
  __tsan_acquire(p);
#endif
}

// Poisoned memory must not be accessed, to AddressSanitizer.
inline void poison([[maybe_unused]] void *p, [[maybe_unused]] size_t bytes) {
#if defined(EMU_ASAN)
  __asan_poison_memory_region(p, bytes);
#endif
}
inline void unpoison([[maybe_unused]] void *p, [[maybe_unused]] size_t bytes) {
#if defined(EMU_ASAN)
  __asan_unpoison_memory_region(p, bytes);
#endif
}

inline char *map_memory(size_t bytes) {
  const Unobserved unobserved;
  void *p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) abort();
  return (char *)p;
}
inline void unmap_memory(char *p, size_t bytes) {
  const Unobserved unobserved;
  munmap(p, bytes);
}

// A stack, or the one that the caller of a launch runs on. One that is never resumed needs no clean-up.
class Fiber {
 public:
  static constexpr size_t stack_bytes = 256 << 10;  // taken from the system page by page
  static constexpr size_t guard_bytes = 64 << 10;   // below it; accesses fault

  Fiber() = default;
  Fiber(const Fiber &) = delete;
  ~Fiber() {
    if (!base_) return;  // not one of ours
    unpoison(stack(), stack_bytes);
    unmap_memory(base_, guard_bytes + stack_bytes);
#if defined(EMU_TSAN)
    __tsan_destroy_fiber(tsan_);
#endif
  }

  // Takes the stack of the caller, which is to switch away from it.
  void adopt() {
#if defined(EMU_TSAN)
    tsan_ = __tsan_get_current_fiber();
#endif
  }

  // Makes the next switch to this fiber call `entry`, which must not return.
  void prepare(void (*entry)()) {
#if defined(EMU_TSAN)
    if (base_) unmap_memory(base_, guard_bytes + stack_bytes), base_ = nullptr;
    if (tsan_) __tsan_destroy_fiber(tsan_);
    tsan_ = __tsan_create_fiber(0);
#endif
    if (!base_) {
      base_ = map_memory(guard_bytes + stack_bytes);
      mprotect(base_, guard_bytes, PROT_NONE);
    }
    unpoison(stack(), stack_bytes);
    void **words = (void **)(stack() + stack_bytes) - words_above_them - saved_words;
    for (int i = 0; i < saved_words + words_above_them; i++) words[i] = nullptr;
    words[return_word] = (void *)entry;
    stack_pointer_ = words;
    fake_stack_ = nullptr;
  }

#if defined(EMU_TSAN)
  // The name in reports.
  void call_it(const char *name) { __tsan_set_fiber_name(tsan_, name); }
#endif

  // Returns when something switches back to `from`.
  static void change(Fiber &from, Fiber &to, [[maybe_unused]] bool for_good = false) {
#if defined(EMU_ASAN)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack_, to.bottom_or_stack(), to.size_or_stack());
#elif defined(EMU_TSAN)
    __tsan_switch_to_fiber(to.tsan_, 1);  // 1: the switch itself orders nothing
#endif
    emu_switch(&from.stack_pointer_, to.stack_pointer_);
#if defined(EMU_ASAN)
    __sanitizer_finish_switch_fiber(from.fake_stack_, nullptr, nullptr);
#endif
  }

  // Makes what it has done happen before what follows acquire(p); for one that will not be resumed.
  void release_all([[maybe_unused]] void *p) {
#if defined(EMU_TSAN)
    void *current = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(tsan_, 1);
    __tsan_release(p);
    __tsan_switch_to_fiber(current, 1);
#endif
  }

  // To be called first on a new stack; `caller` is the one that switched to it.
  static void arrive([[maybe_unused]] Fiber &caller) {
#if defined(EMU_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &caller.bottom_, &caller.size_);
#endif
  }

  bool on_stack(const void *p) const { return base_ && (char *)p >= stack() && (char *)p < stack() + stack_bytes; }
  bool in_guard(const void *p) const { return base_ && (char *)p >= base_ && (char *)p < stack(); }

 private:
  char *stack() const { return base_ + guard_bytes; }
  const void *bottom_or_stack() const { return base_ ? stack() : bottom_; }
  size_t size_or_stack() const { return base_ ? stack_bytes : size_; }

  void *stack_pointer_ = nullptr;
  char *base_ = nullptr;
  void *fake_stack_ = nullptr, *tsan_ = nullptr;
  const void *bottom_ = nullptr;  // of an adopted stack, where known
  size_t size_ = 0;
};

}  // namespace emu
