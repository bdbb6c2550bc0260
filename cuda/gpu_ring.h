// Sweeps over time whose rows come through shared memory. It holds a ring of laps of a few steps: while one is gone
// through, copies of those behind it are under way, of more bytes than registers would hold. The steps of a lap follow
// each other without a branch, so that what does not wait for the state is computed while something else does.
//
// Warps lie in one sequence and arrays at multiples of 16 bytes, so that the threads of a warp copy for each other: see
// gpu_stage.h.
#pragma once

#include "gpu_stage.h"

template <class Cell, class Io, class Saved, unsigned wide, class Plan>
struct GpuRing {
  typedef GpuStage<Cell, Io, Saved, wide, Plan> Stage;
  typedef typename Stage::Sweep Sweep;
  typedef typename Stage::Tile Tile;
  typedef typename Stage::Copy Copy;
  typedef typename Sweep::real real;
  typedef typename Sweep::Row Row;
  typedef typename Sweep::Part Part;
  typedef typename Sweep::Fixed Fixed;
  typedef typename Sweep::template BackRow<Saved> BackRow;
  template <bool reverse>
  using Span = typename Sweep::template Span<reverse>;

  static constexpr int lap = Plan::depth, laps = Plan::laps, step_bytes = Tile::step_bytes;
  static_assert((Stage::group == 32 || Stage::rows == 1) && lap % Stage::rows == 0, "warps copy whole laps");

  // The place of a lap in the ring.
  SRU_FN unsigned char *place(int i) {
    extern __shared__ __align__(16) unsigned char sru_shared[];
    return sru_shared + i * lap * step_bytes;
  }
  SRU_FN int after(int i) { return i + 1 < laps ? i + 1 : 0; }

  // ----------------------------------------------------------------------------------------------------------------
  // From global memory to shared

  template <class From>
  SRU_FN void copy_row(const From &from, int k, Copy copy) {
    Stage::copy_inputs(from, k, copy);
  }
  template <bool reverse>
  SRU_FN void copy_row(const typename Sweep::template BackReader<reverse, Saved> &from, int k, Copy copy) {
    Stage::copy_inputs(from.rows, k, copy);
    copy(from.dh + k * from.dh_step);
    for (int i = 0; i < Cell::n_state; i++) copy(from.state[i] - k * from.state_step);
  }

  // Copies `left` rows, a lap at a time. `from` is at the first one of which this thread copies a part.
  template <class From>
  struct Copies {
    From from;
    int left, to;

    SRU_MEMBER void next() {
      unsigned char *const at = place(to) + Stage::row_of_mine() * step_bytes;
#pragma unroll
      for (int k = 0; k < lap; k += Stage::rows)
        if (k + Stage::row_of_mine() < left) copy_row(from, k, Copy{at + k * step_bytes});
      from.advance(lap);
      left -= lap;
      to = after(to);
      cp_async_commit();
    }
  };

  // ----------------------------------------------------------------------------------------------------------------
  // Flags of the rows to come, first row first: some at hand, the next ones on their way.

  template <class From>
  struct Marks {
    static constexpr int bits = 8 * sizeof(typename Stage::Bits);
    static_assert(bits % lap == 0, "none run out within a lap");
    From from;  // at the first row of those on their way
    int left, used;
    typename Stage::Flags coming;
    typename Stage::Bits padded, starts_anew;

    SRU_MEMBER Marks(const From &from, int left) : from(from), left(left), used(bits) {
      if (Plan::has_mask || Plan::has_reset) coming.read(from, left);
    }
    SRU_MEMBER void next_lap() {
      if (!(Plan::has_mask || Plan::has_reset)) return;
      if (used < bits) {
        used += lap, padded >>= lap, starts_anew >>= lap;
        return;
      }
      const typename Stage::Marks found(coming);
      used = lap, padded = found.padded, starts_anew = found.starts_anew;
      from.advance(bits);
      left -= bits;
      coming.read(from, left);
    }
    SRU_MEMBER void put(Row &row, int k) const {
      row.padded = Plan::has_mask && padded >> k & 1;
      row.starts_anew = Plan::has_reset && starts_anew >> k & 1;
    }
    SRU_MEMBER void put(BackRow &back, int k) const { put(back.row, k); }
  };

  // ----------------------------------------------------------------------------------------------------------------

  // What a lap reads of its place in the ring.
  template <class Found, class Flags>
  struct Lap {
    unsigned char *at;
    const Flags &marks;
    int step;

    SRU_MEMBER Found read(int k) const {
      Found row;
      typename Tile::template Move<false> move = {at + k * step_bytes};
      Tile::visit(row, move);
      marks.put(row, step + k);
      return row;
    }
    SRU_MEMBER void advance(int k) {
      at += k * step_bytes;
      step += k;
    }
  };

  // Gives work n rows in turn, `at_once` laps at a time. `copied` is at the first of which this thread copies a part,
  // `marked` at the very first.
  template <int at_once, class Found, class From, class Reader, class Work>
  SRU_FN void sweep(const From &copied, const Reader &marked, int n, Work &work) {
    constexpr int early = 3;
    static_assert(laps >= 2 * at_once, "some are on their way while others are gone through");
    Copies<From> copies = {copied, n, 0};
    Marks<Reader> marks(marked, n);
#pragma unroll 1
    for (int i = at_once; i < laps; i++) copies.next();
    int here = 0;
    for (; n >= at_once * lap; n -= at_once * lap) {
      cp_async_wait<laps - 2 * at_once>();
      Stage::meet();  // what others have copied is there, and the laps before are no longer needed
      Found rows[at_once * lap];
#pragma unroll
      for (int i = 0; i < at_once; i++, here = after(here)) {
        marks.next_lap();
        const Lap<Found, Marks<Reader>> from = {place(here), marks, 0};
#pragma unroll
        for (int k = 0; k < lap; k++) {
          if (i * lap + k == early)
            for (int j = 0; j < at_once; j++) copies.next();
          rows[i * lap + k] = from.read(k);
        }
      }
#pragma unroll
      for (int k = 0; k < at_once * lap; k++) work.take(rows[k], k);
      work.advance(at_once * lap);
    }
    cp_async_wait<0>();
    Stage::meet();
    for (; n > 0; n -= lap, here = after(here)) {
      marks.next_lap();
      Lap<Found, Marks<Reader>> rows = {place(here), marks, 0};
#pragma unroll 1
      for (int k = n < lap ? n : lap; k > 0; k--) Stage::template steps<1>(rows, work);
    }
  }

  // ----------------------------------------------------------------------------------------------------------------

  template <bool reverse>
  SRU_FN void forward_direction(const ForwardArguments<Cell> &f) {
    const Part at(f.given);
    if (at.idle) return;
    const Span<reverse> span(f.given, at, 0);
    const Fixed fixed(f.given, at, reverse);
    typename Sweep::Keeper keep(f, at, span);
    auto work = Sweep::forward_work(f, at, span, fixed, keep);
    Sweep::start_state(f.given, at, span, work.state);
    if (reverse) keep.skip(work.state, int(span.begin - span.from));
    typedef typename Sweep::template Reader<reverse, !reverse> Reader;
    const Reader copied(f.given, Stage::copied_by(at), span.time(span.begin + Stage::row_of_mine()));
    sweep<2, Row>(copied, Reader(f.given, at, span.time(span.begin)), int(span.end - span.begin), work);
    if (!reverse) keep.skip(work.state, int(span.to - span.end));
    Sweep::write_padding(f, at, span);
    Sweep::write_last(f, at, reverse, work.state);
  }

  template <bool reverse>
  SRU_FN void backward_direction(const BackwardArguments<Cell> &f) {
    const Part at(f.given);
    if (at.idle) return;
    const Span<reverse> span(f.given, at, 0);
    const Fixed fixed(f.given, at, reverse);
    real dstate[Cell::n_state];
    Sweep::end_adjoint(f, at, span, dstate);
    typename Sweep::template Backward<reverse> work(f, at, span, fixed, dstate);
    const index_t last = span.end - 1;
    const auto copied = Sweep::back_reader(f, Stage::copied_by(at), span, last - Stage::row_of_mine());
    const typename Sweep::template Reader<reverse, reverse> marked(f.given, at, span.time(last));
    sweep<1, BackRow>(copied, marked, int(span.end - span.begin), work);
    work.finish(f, at, span);
    work.pad(f, at, span);
  }

  SRU_FN void forward(const ForwardArguments<Cell> &f) {
    if (Plan::D == 1 || blockIdx.y == 0)
      forward_direction<false>(f);
    else
      forward_direction<true>(f);
  }
  SRU_FN void backward(const BackwardArguments<Cell> &f) {
    if (Plan::D == 1 || blockIdx.y == 0)
      backward_direction<false>(f);
    else
      backward_direction<true>(f);
  }
};

#define SRU_GPU_FORWARD_RING(Cell, Io, Saved, wide, Plan, bytes)                                         \
  static_assert(sizeof(ForwardArguments<Cell>) == bytes, "cuda/arguments.h and sru_rt/abi.py disagree"); \
  extern "C" __global__ void __launch_bounds__(Plan::threads, 1)                                         \
      forward(const __grid_constant__ ForwardArguments<Cell> f) {                                        \
    GpuRing<Cell, Io, Saved, wide, Plan>::forward(f);                                                    \
  }
#define SRU_GPU_BACKWARD_RING(Cell, Io, Saved, wide, Plan, bytes)                                         \
  static_assert(sizeof(BackwardArguments<Cell>) == bytes, "cuda/arguments.h and sru_rt/abi.py disagree"); \
  extern "C" __global__ void __launch_bounds__(Plan::threads, 1)                                          \
      backward(const __grid_constant__ BackwardArguments<Cell> f) {                                       \
    GpuRing<Cell, Io, Saved, wide, Plan>::backward(f);                                                    \
  }                                                                                                       \
  SRU_GPU_SUMS(Cell, Io, Saved, wide, Plan)
