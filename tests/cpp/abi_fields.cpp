// Writes every field of the argument structs to a list, by its name, for tests/test_compile_cpu.py. That appends the
// cells, as structs of their counts, and SRU_FIELDS(Cell) for each of them.
#include "arguments.h"

struct Fields {
  index_t *out;

  void add(index_t value) { *out++ = value; }
  void add(const void *pointer) { add((index_t)pointer); }
  void add(const void *const *pointers, int n) {
    for (int i = 0; i < n; i++) add(pointers[i]);
  }
  void add(const Slot &slot) { add(slot.data), add(slot.stride); }
  void add(const Slot *slots, int n) {
    for (int i = 0; i < n; i++) add(slots[i]);
  }

  template <class Cell>
  void add(const RecurrenceArguments<Cell> &a) {
    add(a.L), add(a.B), add(a.D), add(a.d), add(a.every);
    add(a.lengths), add(a.mask), add(a.reset);
    add(a.gate, Cell::n_gates), add(a.input, Cell::n_inputs);
    add(a.per_sequence, Cell::n_per_sequence), add(a.param, Cell::n_params);
    add(a.c0, Cell::n_state);
    for (int i = 0; i < Cell::n_constants; i++) add((index_t)a.constant[i]);
    add(a.chunk), add(a.carry);
  }
  template <class Cell>
  void add(const ForwardArguments<Cell> &f) {
    add(f.given);
    add(f.h), add(f.c_last, Cell::n_state), add(f.saved, Cell::n_state);
    add(f.x), add(f.weight), add(f.d_in);
  }
  template <class Cell>
  void add(const BackwardArguments<Cell> &f) {
    add(f.given);
    add(f.dh), add(f.dc_last, Cell::n_state), add(f.saved, Cell::n_state), add(f.states, Cell::n_state);
    add(f.partial);
    add(f.dgate, Cell::n_gates), add(f.dinput, Cell::n_inputs);
    add(f.dper_sequence, Cell::n_per_sequence), add(f.dparam, Cell::n_params);
    add(f.dc0, Cell::n_state), add(f.saved_chunk);
  }
};

// Returns the number of fields written; `size` is that of the struct.
template <class Arguments>
static index_t list_fields(const void *arguments, index_t *out, index_t *size) {
  Fields fields = {out};
  fields.add(*(const Arguments *)arguments);
  *size = sizeof(Arguments);
  return fields.out - out;
}

#define SRU_FIELDS(Cell)                                                                   \
  SRU_EXPORT index_t forward_##Cell(const void *arguments, index_t *out, index_t *size) {  \
    return list_fields<ForwardArguments<Cell>>(arguments, out, size);                      \
  }                                                                                        \
  SRU_EXPORT index_t backward_##Cell(const void *arguments, index_t *out, index_t *size) { \
    return list_fields<BackwardArguments<Cell>>(arguments, out, size);                     \
  }
