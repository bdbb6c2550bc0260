// The three kernels of gpu_scan.h as one. A block takes a number, which says which chunk of which channels is its own.
// It summarises the chunk, publishes that, finds from the summaries of earlier chunks the state that reaches its own,
// and goes through the chunk again for the results: what it then reads for the second time lies in shared memory (see
// gpu_tile.h), if there is room.
//
// Numbers are given in the order in which blocks begin, chunk by chunk. So a block only ever waits for blocks that have
// begun, in whatever order the GPU starts them and however few it runs at once.
//
// Summaries are applied to a state, one after another, and never composed. So a state is the same to the last bit
// whichever block computes it, and it is the one that fold() would leave. Therefore a block need not begin at the first
// chunk: it takes the last state that it finds published.
#pragma once

#include "gpu_scan.h"
#include "gpu_tile.h"

template <class Cell, class Io, class Saved, unsigned wide, class Plan>
struct GpuLookahead {
  typedef GpuScan<Cell, Io, Saved, wide, Plan> Scan;
  typedef typename Scan::Sweep Sweep;
  typedef typename Scan::Summary Summary;
  typedef typename Scan::Rows Rows;
  typedef GpuTile<Cell, Io, Saved, wide, Plan> Tile;
  typedef typename Sweep::acc acc;
  typedef typename Sweep::real real;
  typedef typename Sweep::Given Given;
  typedef typename Sweep::Part Part;
  typedef typename Sweep::Fixed Fixed;
  template <bool reverse>
  using Span = typename Sweep::template Span<reverse>;

  static constexpr int n = Cell::n_state, width = Plan::width, warp = 32;

  // What is known of a chunk. They follow each other, 0 being nothing.
  enum : unsigned { summary_known = 1, state_known = 2 };

  // ----------------------------------------------------------------------------------------------------------------
  // `carry`: for each chunk the n*(n + 1) rows of its summary, then the n rows of the state after it; then a word for
  // each chunk of the channels of one block, and before these the next number.

  static constexpr int rows = Sweep::carry_rows + n;
  static constexpr int ahead = Scan::fold_depth;  // summaries that a thread reads at once

  SRU_FN index_t columns(const Given &a) {  // blocks of one direction that it takes for all channels
    return Sweep::pieces(Sweep::batch(a) * Sweep::packs, Plan::threads);
  }
  SRU_FN unsigned *words(const Given &a) {
    return (unsigned *)((acc *)a.carry + Sweep::chunks(a) * rows * Scan::batch_rows(a));
  }

  // All chunks of the channels of one block, as the sweep goes.
  struct Column {
    acc *first;
    unsigned *flags;
    index_t count, row;

    SRU_MEMBER Column(const Given &a, const Part &at, int q, index_t block) : count(Sweep::chunks(a)) {
      row = Scan::batch_rows(a);
      first = (acc *)a.carry + at.row(q) * Plan::d + at.j;
      flags = words(a) + 1 + (q * columns(a) + block) * count;
    }
    SRU_MEMBER acc *at(index_t chunk, int i) const { return first + (chunk * rows + i) * row; }

    SRU_MEMBER void write(index_t chunk, const Summary &sum) const {
      for (int i = 0; i < n; i++) store(at(chunk, i), narrow<acc>(sum.b[i]));
      for (int i = 0; i < n * n; i++) store(at(chunk, n + i), narrow<acc>(sum.A[i]));
    }
    SRU_MEMBER void write(index_t chunk, const real *state) const {
      for (int i = 0; i < n; i++) store(at(chunk, Sweep::carry_rows + i), narrow<acc>(state[i]));
    }
    // The summary of a chunk, or in the place of its b the state after it.
    SRU_MEMBER Rows read(index_t chunk, unsigned known) const {
      Rows found;
      for (int i = 0; i < Sweep::carry_rows; i++)
        if (known == state_known && i < n)
          found.row[i] = load_packed<acc, width>(at(chunk, Sweep::carry_rows + i));
        else if (known == summary_known)
          found.row[i] = load_packed<acc, width>(at(chunk, i));
      return found;
    }
    // After a barrier behind which all threads of the block have written.
    SRU_MEMBER void publish(index_t chunk, unsigned known) const {
      if (threadIdx.x == 0) release_flag(flags + chunk, known);
    }

    // The last chunk before `chunk` of which the state is known; the first, of which it will be, if there is none. To
    // be called by whole warps.
    SRU_MEMBER index_t last_known(index_t chunk) const {
      for (index_t end = chunk; end > 0; end -= warp) {
        const index_t i = end - 1 - threadIdx.x % warp;
        const unsigned found = __ballot_sync(~0u, i >= 0 && look_at(flags + (i < 0 ? 0 : i)) == state_known);
        if (found) return end - __ffs(found);
      }
      return 0;
    }

    // The state after the chunks before `chunk`, beginning with that after chunk `from`, for which it waits.
    SRU_MEMBER void look_ahead(index_t from, index_t chunk, real *state) const {
      bool wants_state = true;  // as the summary of chunk `from` is of no use
      while (from < chunk) {
        unsigned known[ahead];
        acquire_flags<ahead>(flags + from, chunk - from, known);
        if (known[0] < (wants_state ? state_known : summary_known)) {
          __nanosleep(20);
          continue;
        }
        Rows found[ahead];
        int ready = 0, done = 0;
#pragma unroll
        for (int i = 0; i < ahead; i++)
          if (ready == i && known[i]) found[i] = read(from + i, known[i]), ready++;
#pragma unroll
        for (int i = 0; i < ahead; i++)
          if (done == i && i < ready && go_on(found[i], known[i], state)) done++;
        from += done;
        wants_state = done < ready;
      }
    }
  };

  // Takes the state over a chunk, by its summary unless the state after it is known; false where that is of no use.
  SRU_FN bool go_on(const Rows &found, unsigned known, real *state) {
    real next[n];
    if (known == state_known) {
      for (int i = 0; i < n; i++) next[i] = widen(found.row[i]);
    } else {
      Summary sum;
      for (int i = 0; i < Sweep::carry_rows; i++) (i < n ? sum.b[i] : sum.A[i - n]) = widen(found.row[i]);
      sum.apply(state, next);
      for (int lane = 0; lane < width; lane++)
        if (!Scan::is_finite(next, lane)) return false;
    }
    for (int i = 0; i < n; i++) state[i] = next[i];
    return true;
  }

  // ----------------------------------------------------------------------------------------------------------------
  // What differs from forward to backward. Both count chunks as they go.

  static constexpr bool has_tile = Plan::in_tile != 0;
  static constexpr typename Sweep::Which read_first = has_tile ? Sweep::in_tile : Sweep::all,
                                         read_then = has_tile ? Sweep::others : Sweep::all;

  // What the first sweep over a chunk, and what the second gives its rows to.
  template <bool first>
  struct Around {
    template <class Work>
    SRU_MEMBER decltype(auto) operator()(Work &work) const {
      if constexpr (has_tile)
        return typename Tile::template Through<Work, first>(work);
      else
        return (work);
    }
  };

  template <bool reverse>
  SRU_FN void summarise(const ForwardArguments<Cell> &f, const Part &at, index_t chunk, Summary &sum) {
    const Span<reverse> span(f.given, at, chunk);
    const Fixed fixed(f.given, at, reverse);
    typename Scan::Reduce work = {fixed, sum};
    typename Sweep::template Reader<reverse, !reverse, read_first> from(f.given, at, span.time(span.begin));
    auto &&taker = Around<true>()(work);
    Sweep::template sweep<Plan::reduce_depth>(from, span.end - span.begin, taker);
    sum = work.sum;
  }
  template <bool reverse>
  SRU_FN void begin(const ForwardArguments<Cell> &f, const Part &at, real *state) {
    Sweep::initial_state(f.given, at, reverse, state);
  }
  template <bool reverse>
  SRU_FN void go_through(const ForwardArguments<Cell> &f, const Part &at, index_t chunk, real *state) {
    const Span<reverse> span(f.given, at, chunk);
    const Fixed fixed(f.given, at, reverse);
    typename Sweep::Keeper keep(f, at, span);
    auto work = Sweep::forward_work(f, at, span, fixed, keep);
    for (int i = 0; i < n; i++) work.state[i] = state[i];
    Sweep::template forward_span<Plan::depth, false, read_then>(f, at, span, work, Around<false>());
    for (int i = 0; i < n; i++) state[i] = work.state[i];
    if (span.is_last()) Sweep::write_last(f, at, reverse, state);
  }

  SRU_FN index_t from_the_end(const Given &a, index_t chunk) { return Sweep::chunks(a) - 1 - chunk; }

  template <bool reverse>
  SRU_FN void summarise(const BackwardArguments<Cell> &f, const Part &at, index_t chunk, Summary &sum) {
    const Span<reverse> span(f.given, at, from_the_end(f.given, chunk));
    const Fixed fixed(f.given, at, reverse);
    typename Scan::template ReduceBack<reverse> work = {fixed, sum};
    auto &&taker = Around<true>()(work);
    Scan::template go_back<Plan::reduce_depth, Plan::replay_depth, read_first>(f, at, span, fixed, taker);
    sum = work.sum;
  }
  template <bool reverse>
  SRU_FN void begin(const BackwardArguments<Cell> &f, const Part &at, real *dstate) {
    Sweep::end_adjoint(f, at, Span<reverse>(f.given, at, from_the_end(f.given, 0)), dstate);
  }
  template <bool reverse>
  SRU_FN void go_through(const BackwardArguments<Cell> &f, const Part &at, index_t chunk, real *dstate) {
    const Span<reverse> span(f.given, at, from_the_end(f.given, chunk));
    Sweep::template backward_span<read_then>(f, at, span, dstate, Around<false>());
  }

  // ----------------------------------------------------------------------------------------------------------------
  // One chunk of the channels of a block. All threads come to the barriers, those without a channel too.

  template <bool reverse, class Arguments>
  SRU_FN void take(const Arguments &f, index_t chunk, index_t block) {
    const Part at(f.given, block);
    const Column column(f.given, at, reverse, block);
    const bool is_last = chunk == column.count - 1;
    Summary sum;
    real state[n], after[n];
    if (!at.idle && (has_tile || !is_last)) summarise<reverse>(f, at, chunk, sum);
    if (!is_last) {
      if (!at.idle) column.write(chunk, sum);
      __syncthreads();
      column.publish(chunk, summary_known);
    }

    const index_t known = column.last_known(chunk);
    if (!at.idle) {
      if (chunk)
        column.look_ahead(known, chunk, state);
      else
        begin<reverse>(f, at, state);
    }

    // Where the summary gives what is not finite, the state after the chunk is known once the chunk is done.
    bool late = false;
    if (!is_last) {
      bool useless = false;
      if (!at.idle) {
        sum.apply(state, after);
        for (int lane = 0; lane < width; lane++) useless = useless || !Scan::is_finite(after, lane);
        column.write(chunk, after);
      }
      late = __syncthreads_or(useless);
      if (!late) column.publish(chunk, state_known);
    }
    if (!at.idle) go_through<reverse>(f, at, chunk, state);
    if (!late) return;
    if (!at.idle) {
      for (int lane = 0; lane < width; lane++)
        if (!Scan::is_finite(after, lane))
          for (int i = 0; i < n; i++) after[i].v[lane] = state[i].v[lane];
      column.write(chunk, after);
    }
    __syncthreads();
    column.publish(chunk, state_known);
  }

  template <class Arguments>
  SRU_FN void run(const Arguments &f) {
    __shared__ unsigned number;
    if (threadIdx.x == 0) number = atomicAdd(words(f.given), 1u);
    __syncthreads();
    const index_t across = columns(f.given), chunk = number / (across * Plan::D), rest = number % (across * Plan::D);
    if (Plan::D == 1 || rest < across)
      take<false>(f, chunk, rest);
    else
      take<true>(f, chunk, rest - across);
  }

  // Clears the words, in a launch before.
  SRU_FN void clear(const Given &a) {
    const index_t count = 1 + Plan::D * columns(a) * Sweep::chunks(a);
    for (index_t i = index_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += index_t(gridDim.x) * blockDim.x)
      words(a)[i] = 0;
  }
};

// The entry points of one compiled kernel.
#define SRU_GPU_LOOKAHEAD(name, Arguments, Cell, Io, Saved, wide, Plan, bytes)                                     \
  static_assert(sizeof(Arguments<Cell>) == bytes, "cuda/arguments.h and sru_rt/abi.py disagree");                  \
  extern "C" __global__ void __launch_bounds__(256) clear(const __grid_constant__ Arguments<Cell> f) {             \
    GpuLookahead<Cell, Io, Saved, wide, Plan>::clear(f.given);                                                     \
  }                                                                                                                \
  extern "C" __global__ void __launch_bounds__(Plan::threads, 1) name(const __grid_constant__ Arguments<Cell> f) { \
    GpuLookahead<Cell, Io, Saved, wide, Plan>::run(f);                                                             \
  }
#define SRU_GPU_FORWARD_LOOKAHEAD(Cell, Io, Saved, wide, Plan, bytes) \
  SRU_GPU_LOOKAHEAD(forward, ForwardArguments, Cell, Io, Saved, wide, Plan, bytes)
#define SRU_GPU_BACKWARD_LOOKAHEAD(Cell, Io, Saved, wide, Plan, bytes)               \
  SRU_GPU_LOOKAHEAD(backward, BackwardArguments, Cell, Io, Saved, wide, Plan, bytes) \
  SRU_GPU_SUMS(Cell, Io, Saved, wide, Plan)                                          \
  SRU_GPU_SUM_CHUNKS(Cell, Io, Saved, wide, Plan)
