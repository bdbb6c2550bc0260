// Forwards that are parallel over time, of cells whose steps cannot be composed: each chunk of time begins with a
// guess, and in the end every state is the one of the sequential kernel, to the last bit. blockIdx.z counts chunks as
// the direction goes, and three kernels follow each other:
//
//   forward           every chunk by itself. Its guess is where the last Plan::warm_up steps before it lead to from
//                     zeros: cells that forget have arrived at the true state by then, in all bits
//   mend              chunks whose guess was not what the chunk before has ended with run once more, from there
//   settle            one thread of a channel goes over the chunks in order, and does the same where it is still so
//
// In mend() a chunk goes with both states, and ends where they have become the same: from there on all is as it was
// written. After settle() each chunk has begun with what the one before has truly ended with, and the first one
// with `c0`; nothing depends on luck but time. States are compared as bits: NaN is itself, and zeros have signs.
#pragma once

#include "gpu_sweep.h"

template <class Cell, class Io, class Saved, unsigned wide, class Plan>
struct GpuShoot {
  typedef GpuSweep<Cell, Io, Saved, wide, Plan> Sweep;
  typedef typename Sweep::acc acc;
  typedef typename Sweep::real real;
  typedef typename Sweep::Given Given;
  typedef typename Sweep::Part Part;
  typedef typename Sweep::Fixed Fixed;
  typedef typename Sweep::Row Row;
  typedef typename Sweep::Keeper Keeper;
  template <bool reverse>
  using Span = typename Sweep::template Span<reverse>;

  static constexpr int n = Cell::n_state, width = Plan::width;

  // The states of a chunk in `carry`: those that it began with, those that it ended with, and the latter after mend().
  enum Rows { started = 0, ended = n, mended = 2 * n };

  SRU_FN void read(const Given &a, const Part &at, int q, index_t chunk, Rows rows, real *state) {
    for (int i = 0; i < n; i++) state[i] = widen(load_packed<acc, width>(Sweep::carry(a, at, q, chunk, rows + i)));
  }
  SRU_FN void write(const Given &a, const Part &at, int q, index_t chunk, Rows rows, const real *state) {
    for (int i = 0; i < n; i++) store(Sweep::carry(a, at, q, chunk, rows + i), narrow<acc>(state[i]));
  }

  SRU_FN bool same(const real *x, const real *y) {
    bool yes = true;
    for (int i = 0; i < n; i++)
      for (int lane = 0; lane < width; lane++) yes = yes && bits(x[i].v[lane]) == bits(y[i].v[lane]);
    return yes;
  }
  SRU_FN unsigned int bits(float x) { return __float_as_uint(x); }
  SRU_FN long long bits(double x) { return __double_as_longlong(x); }

  // ----------------------------------------------------------------------------------------------------------------
  // Every chunk by itself

  // The state before a chunk, or what is to pass for it. It is exact where the sequence begins no earlier.
  template <bool reverse>
  SRU_FN void guess(const Given &a, const Part &at, const Span<reverse> &span, const Fixed &fixed, real *state) {
    const index_t end = Sweep::clamp(span.begin, span.first, span.first + span.length);
    const index_t begin = Sweep::clamp(end - Plan::warm_up, span.first, end);
    if (begin == span.first)
      Sweep::initial_state(a, at, reverse, state);
    else
      for (int i = 0; i < n; i++) state[i] = real(0);
    Sweep::template pass<Plan::reduce_depth>(a, at, span, fixed, begin, end, state);
  }

  template <bool reverse>
  SRU_FN void forward_direction(const ForwardArguments<Cell> &f) {
    const Given &a = f.given;
    const Part at(a);
    if (at.idle) return;
    const Span<reverse> span(a, at, blockIdx.z);
    const Fixed fixed(a, at, reverse);
    Keeper keep(f, at, span);
    auto work = Sweep::forward_work(f, at, span, fixed, keep);
    guess(a, at, span, fixed, work.state);
    write(a, at, reverse, span.chunk, started, work.state);
    Sweep::template forward_span<Plan::depth>(f, at, span, work);
    write(a, at, reverse, span.chunk, ended, work.state);
  }

  // ----------------------------------------------------------------------------------------------------------------
  // Once more

  // Steps from another state beside those from the state that was used.
  struct Both : Sweep::Forward {
    real used[n];
    bool stopped;

    SRU_MEMBER void take(const Row &row, int k) {
      real h;
      Sweep::step(row, this->fixed, used, &h);
      Sweep::Forward::take(row, k);
      stopped = same(this->state, used);
    }
  };

  // Takes `state` over a chunk that began with `used`. Returns whether they have become the same on the way: then all
  // that follows is as it was, and `state` is not that of the end.
  template <bool reverse>
  SRU_FN bool once_more(const ForwardArguments<Cell> &f, const Part &at, index_t chunk, const real *used, real *state) {
    const Span<reverse> span(f.given, at, chunk);
    const Fixed fixed(f.given, at, reverse);
    Keeper keep(f, at, span);
    Both work = {Sweep::forward_work(f, at, span, fixed, keep)};
    for (int i = 0; i < n; i++) work.state[i] = state[i], work.used[i] = used[i];
    work.stopped = false;
    Sweep::template forward_span<Plan::depth, true>(f, at, span, work);
    for (int i = 0; i < n; i++) state[i] = work.state[i];
    return work.stopped;
  }

  template <bool reverse>
  SRU_FN void mend_direction(const ForwardArguments<Cell> &f) {  // all chunks but the first
    const Given &a = f.given;
    const Part at(a);
    if (at.idle) return;
    const index_t chunk = blockIdx.z + 1;
    real state[n], used[n];
    read(a, at, reverse, chunk - 1, ended, state);
    read(a, at, reverse, chunk, started, used);
    bool as_it_was = same(state, used);
    if (!as_it_was) {
      write(a, at, reverse, chunk, started, state);
      as_it_was = once_more<reverse>(f, at, chunk, used, state);
    }
    if (as_it_was) read(a, at, reverse, chunk, ended, state);
    write(a, at, reverse, chunk, mended, state);
  }

  // ----------------------------------------------------------------------------------------------------------------
  // In order

  struct Ends {
    typename Sweep::template Pack<acc> started[n], mended[n];
  };

  // Reads what chunks began and ended with.
  struct EndsReader {
    const acc *from;
    index_t row;

    SRU_MEMBER Ends read(index_t k) const {
      Ends ends;
      const acc *const chunk = from + k * Sweep::carry_rows * row;
      for (int i = 0; i < n; i++) {
        ends.started[i] = load_packed<acc, width>(chunk + (started + i) * row);
        ends.mended[i] = load_packed<acc, width>(chunk + (mended + i) * row);
      }
      return ends;
    }
    SRU_MEMBER void advance(index_t k) { from += k * Sweep::carry_rows * row; }
  };

  // Follows the state through chunks, up to one that did not begin with it.
  struct Follow {
    index_t chunk;
    real state[n];
    bool stopped;

    SRU_MEMBER void take(const Ends &ends, int) {
      real used[n];
      for (int i = 0; i < n; i++) used[i] = widen(ends.started[i]);
      stopped = !same(state, used);
      if (stopped) return;
      for (int i = 0; i < n; i++) state[i] = widen(ends.mended[i]);
      chunk++;
    }
    SRU_MEMBER void advance(index_t) {}
  };

  static constexpr int words = 2 * n * width * int(sizeof(acc)) / 4;
  static constexpr int follow_depth = words > 4 ? 64 / words : 16;

  // Takes `state` over a chunk. Where mend() was in vain, both states are seldom the same before its end: so it does
  // without the old one, and has registers to read ahead as far as a sequential kernel.
  template <bool reverse>
  SRU_FN void again(const ForwardArguments<Cell> &f, const Part &at, index_t chunk, real *state) {
    const Span<reverse> span(f.given, at, chunk);
    const Fixed fixed(f.given, at, reverse);
    Keeper keep(f, at, span);
    auto work = Sweep::forward_work(f, at, span, fixed, keep);
    for (int i = 0; i < n; i++) work.state[i] = state[i];
    Sweep::template forward_span<Plan::replay_depth>(f, at, span, work);
    for (int i = 0; i < n; i++) state[i] = work.state[i];
  }

  template <bool reverse>
  SRU_FN void settle_direction(const ForwardArguments<Cell> &f) {
    const Given &a = f.given;
    const Part at(a);
    if (at.idle) return;
    const index_t count = Sweep::chunks(a), row = Sweep::batch(a) * Plan::D * Plan::d;
    Follow work = {1};
    read(a, at, reverse, 0, ended, work.state);
    while (work.chunk < count) {
      EndsReader from = {Sweep::carry(a, at, reverse, work.chunk, 0), row};
      Sweep::template sweep<follow_depth, true>(from, count - work.chunk, work);
      if (work.chunk == count) break;
      again<reverse>(f, at, work.chunk, work.state);
      work.chunk++;
    }
    Sweep::write_last(f, at, reverse, work.state);
  }

  // ----------------------------------------------------------------------------------------------------------------

  SRU_FN constexpr bool upwards() { return Plan::D == 1 || blockIdx.y == 0; }

  SRU_FN void forward(const ForwardArguments<Cell> &f) {
    if (upwards())
      forward_direction<false>(f);
    else
      forward_direction<true>(f);
  }
  SRU_FN void mend(const ForwardArguments<Cell> &f) {
    if (upwards())
      mend_direction<false>(f);
    else
      mend_direction<true>(f);
  }
  SRU_FN void settle(const ForwardArguments<Cell> &f) {
    if (upwards())
      settle_direction<false>(f);
    else
      settle_direction<true>(f);
  }
};

// The entry points of one compiled kernel. `bytes` is what the caller takes for the size of the struct.
#define SRU_GPU_SHOOT(name, Cell, Io, Saved, wide, Plan)         \
  extern "C" __global__ void __launch_bounds__(Plan::threads, 1) \
      name(const __grid_constant__ ForwardArguments<Cell> f) {   \
    GpuShoot<Cell, Io, Saved, wide, Plan>::name(f);              \
  }
#define SRU_GPU_FORWARD_SHOOT(Cell, Io, Saved, wide, Plan, bytes)                                        \
  static_assert(sizeof(ForwardArguments<Cell>) == bytes, "cuda/arguments.h and sru_rt/abi.py disagree"); \
  SRU_GPU_SHOOT(forward, Cell, Io, Saved, wide, Plan)                                                    \
  SRU_GPU_SHOOT(mend, Cell, Io, Saved, wide, Plan)                                                       \
  SRU_GPU_SHOOT(settle, Cell, Io, Saved, wide, Plan)
