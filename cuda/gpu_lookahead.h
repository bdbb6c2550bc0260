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
  static_assert(ahead < warp, "a warp sees more");

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

    // What is known of `warp` chunks from `from` on: a bit for each, the lowest for the first.
    struct Seen {
      index_t from;
      unsigned summaries, states;

      SRU_MEMBER void skip(int chunks) { from += chunks, summaries >>= chunks, states >>= chunks; }
      SRU_MEMBER bool leads_on(bool wants_state) const { return states || (!wants_state && (summaries & 1)); }
    };

    // What follows is for whole warps, with the lanes that have no channel. Each lane looks at one flag: many blocks
    // wait at those of one column, and whoever publishes has to get through.

    // Of the chunks before `chunk`.
    SRU_MEMBER Seen look(index_t from, index_t chunk) const {
      const index_t mine = from + threadIdx.x % warp;
      const unsigned known = mine < chunk ? acquire_flag(flags + mine) : 0;
      __syncwarp();  // what one lane may read now, all may
      const unsigned summaries = __ballot_sync(~0u, known >= summary_known);
      return {from, summaries, __ballot_sync(~0u, known == state_known)};
    }

    // The state after the chunks before `chunk`, by the last state that is known and the summaries behind it. If none
    // is known, it waits for that after the first chunk.
    SRU_MEMBER void look_ahead(index_t chunk, bool idle, real *state) const {
      Seen seen = {chunk, 0, 0};
      while (seen.from && !seen.states) seen = look(seen.from > warp ? seen.from - warp : 0, chunk);
      bool wants_state = true;  // as the summary of the next chunk is of no use
      while (seen.from < chunk) {
        while (!seen.leads_on(wants_state) && !(seen = look(seen.from, chunk)).leads_on(wants_state)) __nanosleep(100);
        wants_state = !follow(seen, idle, state);
      }
    }

    // Takes the state over chunks that it has seen, from the last known state on if there is one. False where the next
    // summary is of no use to some lane: there all lanes stop, and what others have done beyond counts for nothing, as
    // all take the state after that chunk, once it is known.
    SRU_MEMBER bool follow(Seen &seen, bool idle, real *state) const {
      if (seen.states) seen.skip(warp - 1 - __clz(seen.states));
      const int ready = min(ahead, __clz(__brev(~seen.summaries)));
      const auto known = [&](int i) { return i == 0 && seen.states ? state_known : summary_known; };
      Rows found[ahead];
#pragma unroll
      for (int i = 0; i < ahead; i++)
        if (!idle && i < ready) found[i] = read(seen.from + i, known(i));
      int done = idle ? ready : 0;
#pragma unroll
      for (int i = 0; i < ahead; i++)
        if (done == i && i < ready && go_on(found[i], known(i), state)) done++;
      const bool all = __all_sync(~0u, done == ready);
      for (int by = all ? 0 : warp / 2; by; by /= 2) done = min(done, __shfl_xor_sync(~0u, done, by));
      seen.skip(done);
      return all;
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

    if (chunk)
      column.look_ahead(chunk, at.idle, state);
    else if (!at.idle)
      begin<reverse>(f, at, state);

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
