// Rows that a block goes over twice, in shared memory in between. Of each step it holds the values that Plan::in_tile
// names: gates, inputs, the gradient of h and states, one bit each in this order. Each thread finds there what it has
// left there itself, so that there is nothing to wait for.
#pragma once

#include "gpu_sweep.h"

template <class Cell, class Io, class Saved, unsigned wide, class Plan>
struct GpuTile {
  typedef GpuSweep<Cell, Io, Saved, wide, Plan> Sweep;
  typedef typename Sweep::Row Row;
  template <class State>
  using BackRow = typename Sweep::template BackRow<State>;

  static constexpr int step_bytes = Plan::tile_bytes * Plan::threads;

  // Moves one value after another of a step, there or back. Those of all threads lie together.
  template <bool leaves>
  struct Move {
    unsigned char *at;

    template <class Pack>
    SRU_MEMBER void operator()(Pack &pack) {
      decltype(pack.words) *const mine = (decltype(pack.words) *)at + Sweep::thread();
      if (leaves)
        *mine = pack.words;
      else
        pack.words = *mine;
      at += Plan::threads * sizeof *mine;
    }
  };

  // Calls move() for what is held of a row.
  template <class M>
  SRU_FN void visit(Row &row, M &move) {
    for (int i = 0; i < Cell::n_gates; i++)
      if (Sweep::is_in_tile(i)) move(row.gate[i]);
    for (int i = 0; i < Cell::n_inputs; i++) {
      if (!Sweep::is_in_tile(Cell::n_gates + i)) continue;
      if (Sweep::is_wide(i))
        move(row.wide_input[i]);
      else
        move(row.input[i]);
    }
  }
  template <class State, class M>
  SRU_FN void visit(BackRow<State> &back, M &move) {
    visit(back.row, move);
    if (Sweep::is_in_tile(Sweep::bit_of_dh)) move(back.dh);
    for (int i = 0; i < Cell::n_state; i++)
      if (Sweep::is_in_tile(Sweep::bit_of_dh + 1 + i)) move(back.state[i]);
  }

  // What a sweep gives its rows to in place of `work`: leaves their values there, or completes rows by these.
  template <class Work, bool leaves>
  struct Through {
    Work &work;
    unsigned char *lap;

    SRU_MEMBER explicit Through(Work &work) : work(work) {
      extern __shared__ __align__(16) unsigned char sru_shared[];
      lap = sru_shared;
    }
    template <class R>
    SRU_MEMBER void take(const R &row, int k) {
      R whole = row;
      Move<leaves> move = {lap + k * step_bytes};
      visit(whole, move);
      work.take(whole, k);
    }
    SRU_MEMBER void advance(index_t k) {
      lap += k * step_bytes;
      work.advance(k);
    }
  };
};
