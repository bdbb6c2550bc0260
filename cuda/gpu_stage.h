// The backward that recomputes states, with the rows of a piece staged in shared memory: each is read from global
// memory once, for both sweeps over it. As the second one goes back over a piece, rows of the next piece take the
// places of those that it is done with, each that of the row as far from the end of its own piece. What has been asked
// for last is needed first, so that a piece begins with a latency to wait for. Where there is room for two pieces, and
// few warps, gpu_pair.h does better.
//
// Where warps lie in one sequence and arrays at multiples of 16 bytes, the threads of a warp copy for each other, 16
// bytes at once: some of them a row, the next ones the next. A copy has four bytes at least: else two neighbours do,
// where a thread has two. Threads that copy for each other meet before they read rows, and before they copy into the
// places of others.
#pragma once

#include "gpu_tile.h"

template <class Cell, class Io, class Saved, unsigned wide, class Plan>
struct GpuStage {
  typedef GpuSweep<Cell, Io, Saved, wide, Plan> Sweep;
  typedef GpuTile<Cell, Io, Saved, wide, Plan> Tile;
  typedef typename Sweep::acc acc;
  typedef typename Sweep::real real;
  typedef typename Sweep::Given Given;
  typedef typename Sweep::Row Row;
  typedef typename Sweep::Part Part;
  typedef typename Sweep::Fixed Fixed;
  typedef typename Sweep::Piece Piece;
  typedef typename Sweep::Scratch Scratch;
  typedef typename Sweep::template BackRow<acc> BackRow;
  template <bool reverse>
  using Span = typename Sweep::template Span<reverse>;

  static constexpr int width = Plan::width, step_bytes = Tile::step_bytes;
  static constexpr int channels = Plan::copied;  // of a copy
  static constexpr int rows = channels / width;  // that are copied at once
  // Threads that copy for each other.
  static constexpr int group = rows > 1 && Sweep::packs % 32 == 0 ? 32 : rows;
  static constexpr int parts = group / rows;  // of a row, one for a thread

  SRU_FN int number() { return Sweep::thread() % group; }  // in the group
  SRU_FN int row_of_mine() { return number() / parts; }
  SRU_FN int part_of_mine() { return number() % parts * channels; }
  SRU_FN Part copied_by(Part thread) {
    thread.j += part_of_mine() - number() * width;
    return thread;
  }
  SRU_FN void meet() {
    if (group > 1) __syncwarp(group == 32 ? ~0u : 3u << Sweep::thread() % 32 / 2 * 2);
  }

  // ----------------------------------------------------------------------------------------------------------------
  // From global memory to shared

  template <int bytes>
  SRU_FN void start_copy(void *to, const void *from) {
    static_assert(bytes == 4 || bytes == 8 || bytes % 16 == 0, "what copies may have");
    if (bytes == 4) cp_async_4(to, from);
    if (bytes == 8) cp_async_8(to, from);
    for (int i = 0; i < bytes / 16; i++)
      cp_async_16((unsigned char *)to + 16 * i, (const unsigned char *)from + 16 * i);
  }

  // Copies one value after another of a step, for all of the group. They lie as GpuTile::Move has it.
  struct Copy {
    unsigned char *at;

    template <class T>
    SRU_MEMBER void operator()(const T *from) {
      start_copy<sizeof(T) * channels>(at + ((Sweep::thread() - number()) * width + part_of_mine()) * sizeof(T), from);
      at += Plan::threads * width * sizeof(T);
    }
  };

  // The gates and inputs of the row k steps on.
  template <class From>
  SRU_FN void copy_inputs(const From &from, index_t k, Copy &copy) {
    for (int i = 0; i < Cell::n_gates; i++) copy(from.gate + k * from.rows * Plan::gate_stride + i * Plan::d);
    for (int i = 0; i < Cell::n_inputs; i++) {
      const index_t offset = k * from.rows * Plan::input_stride(i);
      if (Sweep::is_wide(i))
        copy((const acc *)from.input[i] + offset);
      else
        copy((const Io *)from.input[i] + offset);
    }
  }

  // Copies the rows of one piece after another, first or last row first.
  template <bool reverse, bool first_first>
  struct Copies {
    static constexpr bool upwards = first_first != reverse;  // in time
    typename Sweep::template Reader<reverse, upwards> from;
    const Io *dh;
    unsigned char *to = nullptr;
    index_t dh_step, step;  // `step` of the direction is the next row, of which this thread copies one behind it
    int stride = 0, left = 0;

    SRU_MEMBER Copies(const BackwardArguments<Cell> &f, const Part &at, const Span<reverse> &span, const Piece &piece)
        : from(f.given, copied_by(at), span.time(first_of(piece) + (first_first ? row_of_mine() : -row_of_mine()))),
          step(first_of(piece)) {
      const index_t rows = Sweep::batch(f.given) * Plan::D * Plan::d;
      dh = (const Io *)f.dh + from.t * rows + at.row(reverse) * Plan::d + copied_by(at).j;
      dh_step = upwards ? rows : -rows;
    }
    SRU_FN index_t first_of(const Piece &piece) { return first_first ? piece.first : piece.last - 1; }

    // Goes to a piece, whose rows are to lie at `at` and every `apart` bytes from there on.
    SRU_MEMBER void begin(const Piece &piece, unsigned char *at, int apart) {
      const index_t first = first_of(piece);
      advance(first_first ? first - step : step - first);
      to = at + row_of_mine() * apart;
      stride = apart;
      left = piece.steps();
    }

    SRU_MEMBER void row(int k) const {
      Copy copy = {to + k * stride};
      copy_inputs(from, k, copy);
      copy(dh + k * dh_step);
    }
    // The next `steps` rows, if there are so many.
    template <int steps>
    SRU_MEMBER void some() {
      if (left < steps) return;
#pragma unroll
      for (int k = 0; k < steps; k += rows)
        if (steps % rows == 0 || k + row_of_mine() < steps) row(k);
      advance(steps);
    }
    // All that are left.
    SRU_MEMBER void others() {
#pragma unroll 1
      while (left > 0) {
        if (row_of_mine() < left) row(0);
        advance(rows);
      }
    }
    SRU_MEMBER void advance(index_t steps) {
      from.advance(steps);
      dh += steps * dh_step;
      to += steps * stride;
      left -= steps;
      step += first_first ? steps : -steps;
    }
  };

  // ----------------------------------------------------------------------------------------------------------------
  // Flags: single bytes, which are the same to all threads of a warp. Each reads those of one step of 32 ahead of time.

  typedef unsigned long long Bits;  // of the steps of a piece, first step first

  struct Flags {
    bool padded[2], starts_anew[2];

    // Of the `n` rows that `from` is at the first of.
    template <class From>
    SRU_MEMBER void read(const From &from, index_t n) {
      for (int i = 0; i < 2; i++) {
        const int k = Sweep::thread() % 32 + 32 * i;
        padded[i] = k < n && from.padded(k);
        starts_anew[i] = k < n && from.starts_anew(k);
      }
    }
    template <bool reverse>
    SRU_MEMBER void read(const Given &a, const Part &at, const Span<reverse> &span, const Piece &piece) {
      read(typename Sweep::template Reader<reverse, !reverse>(a, at, span.time(piece.first)), piece.steps());
    }
    SRU_FN Bits of_all(const bool *mine) {
      return __ballot_sync(~0u, mine[0]) | Bits(__ballot_sync(~0u, mine[1])) << 32;
    }
  };

  struct Marks {
    Bits padded, starts_anew;

    SRU_MEMBER explicit Marks(const Flags &flags)
        : padded(Plan::has_mask ? Flags::of_all(flags.padded) : 0),
          starts_anew(Plan::has_reset ? Flags::of_all(flags.starts_anew) : 0) {}
    SRU_MEMBER void put(Row &row, int step) const {
      row.padded = Plan::has_mask && padded >> step & 1;
      row.starts_anew = Plan::has_reset && starts_anew >> step & 1;
    }
  };

  // ----------------------------------------------------------------------------------------------------------------
  // From shared memory

  // Rows of a piece, first row first, of which each lies `stride` bytes behind the one before.
  struct Forwards {
    unsigned char *at;
    int stride;
    const Marks &marks;
    int step;

    SRU_MEMBER Row read(index_t k) const {
      Row row;
      typename Tile::template Move<false> move = {at + k * stride};
      Tile::visit(row, move);
      marks.put(row, step + k);
      return row;
    }
    SRU_MEMBER void advance(index_t k) {
      at += k * stride;
      step += k;
    }
  };

  // Last row first, with what is known of their steps.
  struct Backwards {
    unsigned char *at;
    int stride;
    Scratch from;
    const Marks &marks;
    int step;

    SRU_MEMBER Backwards(unsigned char *at, int stride, const Scratch &scratch, const Marks &marks, int steps)
        : at(at), stride(stride), from(scratch), marks(marks), step(steps - 1) {
      from.advance(steps - 1);
    }
    SRU_MEMBER BackRow read(index_t k) const {
      BackRow back;
      typename Tile::template Move<false> move = {at + k * stride};
      Tile::visit(back, move);
      marks.put(back.row, step - k);
      for (int i = 0; i < Cell::n_state; i++) back.state[i] = load_packed<acc, width>(from.value[i] - k * from.step);
      for (int i = 0; i < Plan::known; i++)
        back.activation[i] = load_packed<acc, width>(from.value[Cell::n_state + i] - k * from.step);
      return back;
    }
    SRU_MEMBER void advance(index_t k) {
      at += k * stride;
      step -= k;
      from.advance(-k);
    }
  };

  // Calls work.take(row, k) for n rows in turn, of which it reads `lap` at once and the last ones singly, and after()
  // for each whole lap, behind it.
  template <int lap, class From, class Work, class After>
  SRU_FN void sweep(From &from, int n, Work &work, After after) {
#pragma unroll 1
    for (; n >= lap; n -= lap) {
      steps<lap>(from, work);
      after();
    }
#pragma unroll 1
    for (; n > 0; n--) steps<1>(from, work);
  }
  template <int count, class From, class Work>
  SRU_FN void steps(From &from, Work &work) {
    decltype(from.read(0)) rows[count];
#pragma unroll
    for (int k = 0; k < count; k++) rows[k] = from.read(k);
#pragma unroll
    for (int k = 0; k < count; k++) work.take(rows[k], k);
    from.advance(count);
    work.advance(count);
  }

  // ----------------------------------------------------------------------------------------------------------------

  // A piece lies in the order in which it is gone back over, last row first.
  template <bool reverse, class Work>
  SRU_FN void go_back(const BackwardArguments<Cell> &f, const Part &at, const Span<reverse> &span, const Fixed &fixed,
                      Work &work) {
    extern __shared__ __align__(16) unsigned char sru_shared[];
    const Scratch scratch(f, at, reverse, 0, step_bytes);
    const index_t offset = at.row(reverse) * Plan::d + at.j;
    typename Sweep::template Pieces<reverse> all(f, span);
    Piece piece = all.next();
    Copies<reverse, false> copies(f, at, span, piece);
    copies.begin(piece, sru_shared, step_bytes);
    copies.others();
    cp_async_commit();
    typename Sweep::template Pack<Saved> state[Cell::n_state];
    Flags flags;
    if (piece.steps()) piece.read(f, offset, state);
    flags.read(f.given, at, span, piece);
    while (const int steps = piece.steps()) {
      cp_async_wait<0>();
      meet();
      typename Sweep::Replay replay = {fixed, scratch};
      for (int i = 0; i < Cell::n_state; i++) replay.state[i] = widen(state[i]);
      const Marks marks(flags);
      Forwards forwards = {sru_shared + (steps - 1) * step_bytes, -step_bytes, marks, 0};
      sweep<Plan::replay_depth>(forwards, steps, replay, [] {});

      piece = all.next();
      if (piece.steps()) piece.read(f, offset, state);
      flags.read(f.given, at, span, piece);
      copies.begin(piece, sru_shared, step_bytes);
      Backwards backwards(sru_shared, step_bytes, scratch, marks, steps);
      sweep<Plan::depth>(backwards, steps, work, [&copies] {
        meet();
        copies.template some<Plan::depth>();
      });
      meet();
      copies.others();
      cp_async_commit();
    }
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
    go_back(f, at, span, fixed, work);
    work.finish(f, at, span);
    work.pad(f, at, span);
  }

  SRU_FN void backward(const BackwardArguments<Cell> &f) {
    if (Plan::D == 1 || blockIdx.y == 0)
      backward_direction<false>(f);
    else
      backward_direction<true>(f);
  }
};

#define SRU_GPU_BACKWARD_STAGE(Cell, Io, Saved, wide, Plan, bytes)                                        \
  static_assert(sizeof(BackwardArguments<Cell>) == bytes, "cuda/arguments.h and sru_rt/abi.py disagree"); \
  extern "C" __global__ void __launch_bounds__(Plan::threads, 1)                                          \
      backward(const __grid_constant__ BackwardArguments<Cell> f) {                                       \
    GpuStage<Cell, Io, Saved, wide, Plan>::backward(f);                                                   \
  }                                                                                                       \
  SRU_GPU_SUMS(Cell, Io, Saved, wide, Plan)
