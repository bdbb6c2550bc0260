// What a recurrence kernel is given: pointers and sizes, in one struct of 8-byte fields that the caller packs.
// sru_rt/abi.py declares the same fields in the same order.
#pragma once

#include "port.h"

// One scalar of the step function as an array: its first element, and the distance in elements from one row to the
// next. Rows are contiguous over channels.
struct Slot {
  void *data;
  index_t stride;
};

// A row of gates and inputs is (t, b, q): row (t*B + b)*D + q. A row of per-sequence values is (b, q): row b*D + q. A
// row of parameters is the direction q. States are (D, B, d). Null `c0` means zeros; null `lengths`, `mask`, `reset`
// mean none.
template <class Cell>
struct RecurrenceArguments {
  index_t L, B, D, d;
  index_t every;  // the state is kept before steps 0, every, 2*every, ... of each direction (and of each chunk,
                  // unless chunks guess: gpu_shoot.h); 0: not at all
  const index_t *lengths;
  const unsigned char *mask, *reset;
  Slot gate[SRU_AT_LEAST_ONE(Cell::n_gates)], input[SRU_AT_LEAST_ONE(Cell::n_inputs)];
  Slot per_sequence[SRU_AT_LEAST_ONE(Cell::n_per_sequence)], param[SRU_AT_LEAST_ONE(Cell::n_params)];
  const void *c0[Cell::n_state];
  double constant[SRU_AT_LEAST_ONE(Cell::n_constants)];
  index_t chunk;  // on a GPU, steps of a chunk of time; 0: one thread takes all steps
  void *carry;    // scratch where there are chunks, of chunks.carried() elements; see gpu_lookahead.h, gpu_scan.h and
                  // gpu_shoot.h
};

template <class Cell>
struct ForwardArguments {
  RecurrenceArguments<Cell> given;
  void *h;                      // (L, B, D, d)
  void *c_last[Cell::n_state];  // (D, B, d)
  void *saved[Cell::n_state];   // (ceil(L/every), B, D, d), in the order in which each direction goes; of chunks of
                                // time, unless they guess, ceil(chunk/every) rows each
  const void *x, *weight;       // (L, B, d_in) and (D, k, d, d_in) where the kernel forms U; else null
  index_t d_in;
};

// Null `dgate`, `dinput`, `dper_sequence`, `dparam` are not wanted. On the CPU, `dc0` also carries the adjoint of the
// state while the sweep runs. Where there are chunks of time, `partial` has rows (chunk, b, q, param, then
// per-sequence value), and `states` is (chunks, min(every, chunk), B, D, d).
template <class Cell>
struct BackwardArguments {
  RecurrenceArguments<Cell> given;
  const void *dh;
  const void *dc_last[Cell::n_state];  // null: zeros
  const void *saved[Cell::n_state];
  void *states[Cell::n_state];  // scratch, (every, B, D, d), where every > 1
  Slot partial;                 // scratch for sums over time, rows (b, q, param)
  Slot dgate[SRU_AT_LEAST_ONE(Cell::n_gates)], dinput[SRU_AT_LEAST_ONE(Cell::n_inputs)];
  Slot dper_sequence[SRU_AT_LEAST_ONE(Cell::n_per_sequence)], dparam[SRU_AT_LEAST_ONE(Cell::n_params)];
  void *dc0[Cell::n_state];
  index_t saved_chunk;  // steps of the chunks in which kept states are counted anew; 0: they are not
};
