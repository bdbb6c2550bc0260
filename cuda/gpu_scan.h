// Sweeps that are parallel over time, for few channels. Time is cut into chunks, which blockIdx.z counts as the
// direction goes, and three kernels follow each other:
//
//   reduce            what each chunk does to the state that it begins with: new state = A * state + b
//   fold              one thread of a channel goes over these summaries, and leaves each chunk the state it begins with
//   forward           every chunk by itself, with the steps of gpu_sweep.h; likewise `backward`
//
// Backwards it is the adjoint that is carried, from the last chunk to the first, by the transposed Jacobians. Summaries
// are folded in the order of time by one thread, so that the same chunks give the same bits.
//
// A product of Jacobians may overflow, or be NaN, where the recurrence itself does not: where a summary gives a number
// that is not finite, fold() takes the chunk step by step, from the state that it truly begins with.
#pragma once

#include "gpu_sweep.h"

template <class Cell, class Io, class Saved, unsigned wide, class Plan>
struct GpuScan {
  typedef GpuSweep<Cell, Io, Saved, wide, Plan> Sweep;
  typedef typename Sweep::acc acc;
  typedef typename Sweep::real real;
  typedef typename Sweep::Given Given;
  typedef typename Sweep::Part Part;
  typedef typename Sweep::Fixed Fixed;
  typedef typename Sweep::Row Row;
  typedef typename Sweep::Values Values;
  template <bool reverse>
  using Span = typename Sweep::template Span<reverse>;
  template <class State>
  using BackRow = typename Sweep::template BackRow<State>;

  static constexpr int n = Cell::n_state, width = Plan::width;
  static_assert(n <= 2, "matrices of more states are not composed");

  // ----------------------------------------------------------------------------------------------------------------
  // Summaries

  // What some steps do to a state. In `carry`, `n` rows of b and then n*n of A, of one chunk after another.
  struct Summary {
    real A[n * n], b[n];

    SRU_MEMBER Summary() {
      for (int i = 0; i < n; i++) b[i] = real(0);
      for (int i = 0; i < n * n; i++) A[i] = real(i % (n + 1) == 0);
    }
    SRU_MEMBER void forget() {
      for (int i = 0; i < n; i++) b[i] = real(0);
      for (int i = 0; i < n * n; i++) A[i] = real(0);
    }
    // Goes on by a step of Jacobian J, or of its transpose.
    SRU_MEMBER void times(const real *J, bool transposed) {
      real product[n * n];
      for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) {
          product[i * n + j] = J[i * (transposed ? 1 : n)] * A[j];
          for (int k = 1; k < n; k++)
            product[i * n + j] = fma(J[transposed ? k * n + i : i * n + k], A[k * n + j], product[i * n + j]);
        }
      for (int i = 0; i < n * n; i++) A[i] = product[i];
    }
    SRU_MEMBER void apply(const real *state, real *new_state) const {
      for (int i = 0; i < n; i++) {
        new_state[i] = b[i];
        for (int j = 0; j < n; j++) new_state[i] = fma(A[i * n + j], state[j], new_state[i]);
      }
    }
    SRU_MEMBER void write(const Given &a, const Part &at, int q, index_t chunk) const {
      for (int i = 0; i < Sweep::carry_rows; i++)
        store(Sweep::carry(a, at, q, chunk, i), narrow<acc>(i < n ? b[i] : A[i - n]));
    }
  };

  // Of the forward: goes from state 0, for b.
  struct Reduce {
    const Fixed &fixed;
    Summary sum;

    SRU_MEMBER void take(const Row &row, int) {
      const Values in(row);
      real J[n * n], h;
      if (row.starts_anew) sum.forget();
      // A summary is only made of cells whose Jacobian does not depend on the state.
      Cell::template jacobian<real>(in.gate, in.input, fixed.per_sequence, fixed.param, sum.b, fixed.constant, J);
      Summary next = sum;
      next.times(J, false);
      for (int i = 0; i < n * n; i++)
        if (!row.padded) sum.A[i] = next.A[i];
      Sweep::step(row, fixed, sum.b, &h);
    }
    SRU_MEMBER void advance(index_t) {}
  };

  // Of the backward: goes from adjoint 0, for b.
  template <bool reverse>
  struct ReduceBack {
    const Fixed &fixed;
    Summary sum;

    template <class State>
    SRU_MEMBER void take(const BackRow<State> &back, int) {
      if (!back.row.padded) add(back);
      if (back.row.starts_anew) sum.forget();
    }
    template <class State>
    SRU_MEMBER void add(const BackRow<State> &back) {
      const Values in(back.row);
      real state[n], J[n * n], db[n];
      real dgates[SRU_AT_LEAST_ONE(Cell::n_gates)], dinputs[SRU_AT_LEAST_ONE(Cell::n_inputs)];
      real dper_step[SRU_AT_LEAST_ONE(Cell::n_per_sequence)], dparams[SRU_AT_LEAST_ONE(Cell::n_params)];
      Sweep::state_before(back, state);
      const real dh = widen(back.dh);
      Cell::template jacobian<real>(in.gate, in.input, fixed.per_sequence, fixed.param, state, fixed.constant, J);
      Cell::template gradient<real>(in.gate, in.input, fixed.per_sequence, fixed.param, state, fixed.constant, sum.b,
                                    &dh, dgates, dinputs, dper_step, dparams, db);
      sum.times(J, true);
      for (int i = 0; i < n; i++) sum.b[i] = db[i];
    }
    SRU_MEMBER void start(const BackwardArguments<Cell> &, const Part &, index_t) {}
    SRU_MEMBER void advance(index_t) {}
  };

  template <int depth, int replay_depth, typename Sweep::Which which = Sweep::all, bool reverse, class Work>
  SRU_FN void go_back(const BackwardArguments<Cell> &f, const Part &at, const Span<reverse> &span, const Fixed &fixed,
                      Work &work) {
    if constexpr (Plan::keep == 1 || !Plan::reduce_reads_state)
      Sweep::template backward_from_saved<depth, which>(f, at, span, work);
    else
      Sweep::template backward_from_pieces<depth, replay_depth>(f, at, span, fixed, work);
  }

  template <bool reverse>
  SRU_FN void reduce_direction(const ForwardArguments<Cell> &f) {  // all chunks but the last
    const Given &a = f.given;
    const Part at(a);
    if (at.idle) return;
    const Span<reverse> span(a, at, blockIdx.z);
    const Fixed fixed(a, at, reverse);
    Reduce work = {fixed, {}};
    typename Sweep::template Reader<reverse, !reverse> from(a, at, span.time(span.begin));
    Sweep::template sweep<Plan::reduce_depth>(from, span.end - span.begin, work);
    work.sum.write(a, at, reverse, blockIdx.z);
  }

  template <bool reverse>
  SRU_FN void reduce_direction(const BackwardArguments<Cell> &f) {  // all chunks but the first
    const Part at(f.given);
    if (at.idle) return;
    const Span<reverse> span(f.given, at, blockIdx.z + 1);
    const Fixed fixed(f.given, at, reverse);
    ReduceBack<reverse> work = {fixed, {}};
    go_back<Plan::reduce_depth, Plan::replay_depth>(f, at, span, fixed, work);
    work.sum.write(f.given, at, reverse, blockIdx.z);
  }

  template <class Arguments>
  SRU_FN void reduce(const Arguments &f) {
    if (Plan::D == 1 || blockIdx.y == 0)
      reduce_direction<false>(f);
    else
      reduce_direction<true>(f);
  }

  // ----------------------------------------------------------------------------------------------------------------
  // Folding

  struct Rows {
    typename Sweep::template Pack<acc> row[Sweep::carry_rows];
  };

  // Reads summaries, upwards in time or downwards.
  struct SummaryReader {
    const acc *from;
    index_t row, step;

    SRU_MEMBER Rows read(index_t k) const {
      Rows rows;
      for (int i = 0; i < Sweep::carry_rows; i++) rows.row[i] = load_packed<acc, width>(from + k * step + i * row);
      return rows;
    }
    SRU_MEMBER void advance(index_t k) { from += k * step; }
  };

  SRU_FN bool is_finite(const real *state, int lane) {
    bool yes = true;
    for (int i = 0; i < n; i++) yes = yes && state[i].v[lane] - state[i].v[lane] == 0;
    return yes;
  }

  // The state, which takes the place of a summary's b, until a summary is of no use.
  struct Fold {
    acc *to;
    index_t row, step;
    int done;
    bool stopped;
    real state[n];

    SRU_MEMBER void take(const Rows &rows, int k) {
      real next[n];
      apply(rows, next);
      for (int lane = 0; lane < width; lane++) stopped = stopped || !is_finite(next, lane);
      if (stopped) return;
      write(next, k);
    }
    SRU_MEMBER void advance(index_t k) { to += k * step; }
    SRU_MEMBER void apply(const Rows &rows, real *next) const {
      Summary sum;
      for (int i = 0; i < Sweep::carry_rows; i++) (i < n ? sum.b[i] : sum.A[i - n]) = widen(rows.row[i]);
      sum.apply(state, next);
    }
    SRU_MEMBER void write(const real *next, index_t k) {
      for (int i = 0; i < n; i++) state[i] = next[i], store(to + k * step + i * row, narrow<acc>(next[i]));
      done++;
    }
  };

  static constexpr int words = Sweep::carry_rows * width * int(sizeof(acc)) / 4;
  static constexpr int fold_depth = words > 4 ? 64 / words : 16;
  static constexpr int slow_depth = 4;  // of what is seldom run

  // Goes over the summaries, upwards or downwards. `step_by_step(chunk, state)` takes a state over a chunk without one.
  template <bool upwards, class Slowly>
  SRU_FN void fold_chunks(const Given &a, const Part &at, int q, const real *start, Slowly step_by_step) {
    const index_t count = Sweep::chunks(a) - 1, row = batch_rows(a),
                  step = (upwards ? 1 : -1) * Sweep::carry_rows * row;
    acc *const first = Sweep::carry(a, at, q, upwards ? 0 : count - 1, 0);
    SummaryReader from = {first, row, step};
    Fold work = {first, row, step, 0, false};
    for (int i = 0; i < n; i++) work.state[i] = start[i];
    Sweep::template sweep<fold_depth>(from, count, work);
    if (!work.stopped) return;
    // One chunk was of no use, and so may be more.
    from.from = work.to = first;
    for (index_t k = work.done; k < count; k++) {
      real next[n], slow[n];
      work.apply(from.read(k), next);
      bool all = true;
      for (int lane = 0; lane < width; lane++) all = all && is_finite(next, lane);
      if (!all) {
        for (int i = 0; i < n; i++) slow[i] = work.state[i];
        step_by_step(upwards ? k : count - k, slow);
        for (int lane = 0; lane < width; lane++)
          if (!is_finite(next, lane))
            for (int i = 0; i < n; i++) next[i].v[lane] = slow[i].v[lane];
      }
      work.write(next, k);
    }
  }
  SRU_FN index_t batch_rows(const Given &a) { return Sweep::batch(a) * Plan::D * Plan::d; }

  template <bool reverse>
  SRU_FN void fold_direction(const ForwardArguments<Cell> &f) {
    const Given &a = f.given;
    const Part at(a);
    if (at.idle) return;
    real start[n];
    Sweep::initial_state(a, at, reverse, start);
    for (int i = 0; i < n; i++)  // the last chunk has no summary there
      store(Sweep::carry(a, at, reverse, Sweep::chunks(a) - 1, i), narrow<acc>(start[i]));
    fold_chunks<true>(a, at, reverse, start, [&](index_t chunk, real *state) {
      const Span<reverse> span(a, at, chunk);
      const Fixed fixed(a, at, reverse);
      Sweep::template pass<slow_depth>(a, at, span, fixed, span.begin, span.end, state);
    });
  }

  template <bool reverse>
  SRU_FN void fold_direction(const BackwardArguments<Cell> &f) {
    const Given &a = f.given;
    const Part at(a);
    if (at.idle) return;
    real start[n];
    Sweep::end_adjoint(f, at, Span<reverse>(a, at, Sweep::chunks(a) - 1), start);
    fold_chunks<false>(a, at, reverse, start, [&](index_t chunk, real *dstate) {
      const Span<reverse> span(a, at, chunk);
      const Fixed fixed(a, at, reverse);
      ReduceBack<reverse> work = {fixed, {}};
      for (int i = 0; i < n; i++) work.sum.b[i] = dstate[i];
      go_back<slow_depth, slow_depth>(f, at, span, fixed, work);
      for (int i = 0; i < n; i++) dstate[i] = work.sum.b[i];
    });
  }

  template <class Arguments>
  SRU_FN void fold(const Arguments &f) {
    if (Plan::D == 1 || blockIdx.y == 0)
      fold_direction<false>(f);
    else
      fold_direction<true>(f);
  }

  // ----------------------------------------------------------------------------------------------------------------
  // Sums over chunks for value blockIdx.y of one sequence, of direction blockIdx.z.

  SRU_FN void sum_chunks(const BackwardArguments<Cell> &f) {
    constexpr index_t tiles = (Plan::d + 31) / 32;
    const Slot &slot = f.dper_sequence[blockIdx.y];
    const index_t b = blockIdx.x / tiles, j = (blockIdx.x - b * tiles) * 32 + threadIdx.x;
    const index_t row = b * Plan::D + blockIdx.z, step = Sweep::n_sums * f.partial.stride;
    acc *const to = slot.data && j < Plan::d ? (acc *)slot.data + row * slot.stride + j : nullptr;
    const acc *const from = (const acc *)f.partial.data + row * step + (Cell::n_params + blockIdx.y) * f.partial.stride;
    Sweep::sum_up(from + j, Sweep::chunks(f.given), Sweep::batch(f.given) * Plan::D * step, to);
  }
};

// The entry points of one compiled kernel beside those of gpu_sweep.h.
#define SRU_GPU_SCAN(Arguments, Cell, Io, Saved, wide, Plan)                                                         \
  extern "C" __global__ void __launch_bounds__(Plan::threads, 1) reduce(const __grid_constant__ Arguments<Cell> f) { \
    GpuScan<Cell, Io, Saved, wide, Plan>::reduce(f);                                                                 \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(Plan::threads, 1) fold(const __grid_constant__ Arguments<Cell> f) {   \
    GpuScan<Cell, Io, Saved, wide, Plan>::fold(f);                                                                   \
  }
#define SRU_GPU_FORWARD_SCAN(Cell, Io, Saved, wide, Plan, bytes) \
  SRU_GPU_SCAN(ForwardArguments, Cell, Io, Saved, wide, Plan)    \
  SRU_GPU_FORWARD(Cell, Io, Saved, wide, Plan, bytes)
#define SRU_GPU_BACKWARD_SCAN(Cell, Io, Saved, wide, Plan, bytes) \
  SRU_GPU_SCAN(BackwardArguments, Cell, Io, Saved, wide, Plan)    \
  SRU_GPU_BACKWARD(Cell, Io, Saved, wide, Plan, bytes)            \
  SRU_GPU_SUM_CHUNKS(Cell, Io, Saved, wide, Plan)
#define SRU_GPU_SUM_CHUNKS(Cell, Io, Saved, wide, Plan)                                                             \
  extern "C" __global__ void __launch_bounds__(256) sum_chunks(const __grid_constant__ BackwardArguments<Cell> f) { \
    GpuScan<Cell, Io, Saved, wide, Plan>::sum_chunks(f);                                                            \
  }
