// The backward that recomputes states, by pairs of warps: one recomputes the states of a piece while the other goes
// back over the piece that follows it in time. So neither waits for what the other computes but at the end of a piece,
// and the schedulers of a multiprocessor have two warps where there are as few channels as one would take.
//
// Shared memory holds the rows of two pieces and their states, and as many activations of their steps as there is room
// for, which need not be computed twice. Of each piece in turn, last piece first, the warp that recomputes copies the
// rows, then replays it; when the other warp has gone back over a part of the piece at hand, rows of the next piece but
// one take the places of those. They are needed first row first, but places become free last row first: so a piece lies
// mirrored where the one before it in the same places does not. Both meet after each of a few parts of a piece.
//
// Warps lie in one sequence and arrays at multiples of 16 bytes, so that the threads of a warp copy for each other: see
// gpu_stage.h.
#pragma once

#include "gpu_stage.h"

template <class Cell, class Io, class Saved, unsigned wide, class Plan>
struct GpuPair {
  typedef GpuStage<Cell, Io, Saved, wide, Plan> Stage;
  typedef typename Stage::Sweep Sweep;
  typedef typename Sweep::real real;
  typedef typename Sweep::Part Part;
  typedef typename Sweep::Fixed Fixed;
  typedef typename Sweep::Piece Piece;
  typedef typename Sweep::Scratch Scratch;
  typedef typename Stage::Flags Flags;
  typedef typename Stage::Marks Marks;
  template <bool reverse>
  using Span = typename Sweep::template Span<reverse>;
  template <bool reverse>
  using Pieces = typename Sweep::template Pieces<reverse>;

  static constexpr int parts = 4, lap = Plan::depth, step_bytes = Stage::step_bytes;
  static_assert(Sweep::paired && (Stage::group == 32 || Stage::rows == 1), "whole warps copy for each other");
  static_assert(Plan::threads == 32, "a block is one pair, which meets at the barrier of the block");
  static_assert(Plan::scratch_in_shared, "both warps find states there");

  SRU_FN int steps_of_part(index_t every) { return int(Sweep::pieces(Sweep::pieces(every, parts), lap)) * lap; }
  SRU_FN int smaller(int a, int b) { return a < b ? a : b; }

  // Where piece number k lies: its first row, the way from a row to the next one, and what is known of its steps. The
  // fourth one behind it lies in the same way.
  struct Place {
    unsigned char *first;
    int stride;
    Scratch states;

    SRU_MEMBER Place(const BackwardArguments<Cell> &f, const Part &at, int q, int k)
        : states(f, at, q, 0, 2 * step_bytes) {
      extern __shared__ __align__(16) unsigned char sru_shared[];
      const int every = int(f.given.every), half = k % 2;
      const bool mirrored = k / 2 % 2;
      first = sru_shared + (half * every + (mirrored ? every - 1 : 0)) * step_bytes;
      stride = mirrored ? -step_bytes : step_bytes;
      states.advance(half * Scratch::values * every);
    }
  };

  // ----------------------------------------------------------------------------------------------------------------

  template <bool reverse>
  struct Copies : Stage::template Copies<reverse, true> {
    SRU_MEMBER Copies(const BackwardArguments<Cell> &f, const Part &at, const Span<reverse> &span, const Piece &piece,
                      const Place &to)
        : Stage::template Copies<reverse, true>(f, at, span, piece, to.first, to.stride) {}

    // The next ones of a piece, if there are so many.
    SRU_MEMBER void part(int steps) {
#pragma unroll 1
      for (; steps > 0; steps -= lap) {
#pragma unroll
        for (int k = 0; k < lap; k += Stage::rows)
          if (k + Stage::row_of_mine() < smaller(lap, this->left)) this->row(k);
        this->advance(lap);
      }
      cp_async_commit();
    }
  };

  // Replays one piece after another, and copies the one behind it meanwhile; the first one behind none.
  template <bool reverse>
  SRU_FN void recompute(const BackwardArguments<Cell> &f, const Part &at, const Span<reverse> &span,
                        const Fixed &fixed) {
    const index_t offset = at.row(reverse) * Plan::d + at.j;
    const int of_part = steps_of_part(f.given.every);
    Pieces<reverse> all(f, span);
    Piece piece = {}, next = all.next();
    typename Sweep::template Pack<Saved> state[Cell::n_state] = {};
    Flags flags = {};
    for (int k = 0; piece.steps() + next.steps(); k++) {
      const Place here(f, at, reverse, k + 3);  // that of piece k - 1
      typename Sweep::Replay replay = {fixed, here.states};
      for (int i = 0; i < Cell::n_state; i++) replay.state[i] = widen(state[i]);
      const Marks marks(flags);
      if (next.steps()) next.read(f, offset, state);
      flags.read(f.given, at, span, next);
      Copies<reverse> copies(f, at, span, next, Place(f, at, reverse, k));
      typename Stage::Forwards rows = {here.first, here.stride, marks, 0};
      int left = piece.steps();
#pragma unroll 1
      for (int i = 0; i < parts; i++, left -= of_part) {
        cp_async_wait<parts - 1>();
        Stage::meet();
        Stage::template sweep<Plan::replay_depth>(rows, smaller(left, of_part), replay, [] {});
        ::meet();  // the partner
        copies.part(of_part);
      }
      piece = next;
      next = all.next();
    }
  }

  template <bool reverse, class Work>
  SRU_FN void go_back(const BackwardArguments<Cell> &f, const Part &at, const Span<reverse> &span, Work &work) {
    const int of_part = steps_of_part(f.given.every);
    Pieces<reverse> all(f, span);
    Piece piece = all.next();
    Flags flags;
    flags.read(f.given, at, span, piece);
#pragma unroll 1
    for (int i = 0; piece.steps() && i < 2 * parts; i++) ::meet();  // the other one is at the first piece
    for (int k = 0; int left = piece.steps(); k++) {
      const Place here(f, at, reverse, k);
      const Marks marks(flags);
      work.start(f, at, span.time(piece.last - 1));
      piece = all.next();
      flags.read(f.given, at, span, piece);
      typename Stage::Backwards rows(here.first + (left - 1) * here.stride, -here.stride, here.states, marks, left);
#pragma unroll 1
      for (int i = 0; i < parts; i++, left -= of_part) {
        Stage::template sweep<lap>(rows, smaller(left, of_part), work, [] {});
        if (piece.steps()) ::meet();
      }
    }
  }

  template <bool reverse>
  SRU_FN void backward_direction(const BackwardArguments<Cell> &f, bool recomputes) {
    const Part at(f.given);
    if (at.idle) return;
    const Span<reverse> span(f.given, at, 0);
    const Fixed fixed(f.given, at, reverse);
    if (recomputes) {
      recompute(f, at, span, fixed);
      return;
    }
    real dstate[Cell::n_state];
    Sweep::end_adjoint(f, at, span, dstate);
    typename Sweep::template Backward<reverse> work(f, at, span, fixed, dstate);
    go_back(f, at, span, work);
    work.finish(f, at, span);
    work.pad(f, at, span);
  }

  // Which warp of a block recomputes changes with its place, so that each scheduler has as many of one kind as of the
  // other.
  SRU_FN bool recomputes() {
    extern __shared__ __align__(16) unsigned char sru_shared[];
    int *const turned = (int *)sru_shared;
    if (threadIdx.x == 0) *turned = place_of_warp() / 4 % 2;
    __syncthreads();
    const bool found = (threadIdx.x >= Plan::threads) != (*turned != 0);
    __syncthreads();
    return found;
  }

  SRU_FN void backward(const BackwardArguments<Cell> &f) {
    const bool mine = recomputes();
    if (Plan::D == 1 || blockIdx.y == 0)
      backward_direction<false>(f, mine);
    else
      backward_direction<true>(f, mine);
  }
};

#define SRU_GPU_BACKWARD_PAIR(Cell, Io, Saved, wide, Plan, bytes)                                         \
  static_assert(sizeof(BackwardArguments<Cell>) == bytes, "cuda/arguments.h and sru_rt/abi.py disagree"); \
  extern "C" __global__ void __launch_bounds__(2 * Plan::threads, 1)                                      \
      backward(const __grid_constant__ BackwardArguments<Cell> f) {                                       \
    GpuPair<Cell, Io, Saved, wide, Plan>::backward(f);                                                    \
  }                                                                                                       \
  SRU_GPU_SUMS(Cell, Io, Saved, wide, Plan)
