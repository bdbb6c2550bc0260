// What code compiled with -fsanitize=undefined calls when it finds something: here it ends the launch with the place in
// the kernel, rather than the process. The names and structures are the compiler's interface to its own library.
#include "runtime.h"

namespace {
struct Place {
  const char *file;
  unsigned int line, column;
  operator emu::Site() const { return {file, int(line)}; }
};
struct Type {
  unsigned short kind, info;
  char name[1];  // in quotes
};
struct TypeMismatch {
  Place place;
  const Type *type;
  unsigned char log2_alignment, access;
};
struct OutOfBounds {
  Place place;
  const Type *array, *index;
};
}  // namespace

extern "C" {
void __ubsan_handle_type_mismatch_v1_abort(const TypeMismatch *what, unsigned long address) {
  if (!address) emu::fail(what->place, "null pointer to %s", what->type->name);
  emu::fail(what->place, "misaligned address 0x%lx of %s, which is aligned to %d", address, what->type->name,
            1 << what->log2_alignment);
}
void __ubsan_handle_out_of_bounds_abort(const OutOfBounds *what, unsigned long index) {
  emu::fail(what->place, "index %ld is out of bounds of %s", long(index), what->array->name);
}
void __ubsan_handle_pointer_overflow_abort(const Place *where, unsigned long base, unsigned long result) {
  emu::fail(*where, "pointer overflow from 0x%lx to 0x%lx", base, result);
}
void __ubsan_handle_shift_out_of_bounds_abort(const Place *where, unsigned long, unsigned long) {
  emu::fail(*where, "shift by too many bits, or of a negative number");
}
#define EMU_OVERFLOW(name, what)                                                                  \
  void __ubsan_handle_##name##_overflow_abort(const Place *where, unsigned long, unsigned long) { \
    emu::fail(*where, what);                                                                      \
  }
EMU_OVERFLOW(add, "signed integer overflow in an addition")
EMU_OVERFLOW(sub, "signed integer overflow in a subtraction")
EMU_OVERFLOW(mul, "signed integer overflow in a multiplication")
EMU_OVERFLOW(negate, "signed integer overflow in a negation")
EMU_OVERFLOW(divrem, "division by zero, or signed integer overflow in a division")
void __ubsan_handle_builtin_unreachable(const Place *where) { emu::fail(*where, "code that must not be reached"); }
void __ubsan_handle_missing_return(const Place *where) { emu::fail(*where, "a function returns no value"); }
}
