// The backward that recomputes states, by pairs of warps: one recomputes the states of a piece while the other goes
// back over the piece that follows it in time. So neither waits for what the other computes but at the end of a piece,
// and the schedulers of a multiprocessor have two warps where there are as few channels as one would take.
//
// Shared memory holds the rows of two or three pieces, the states of the two at hand, and as many activations of their
// steps as there is room for, which need not be computed twice. The warp that recomputes goes through the pieces, last
// piece first; while it replays one, the other warp goes back over the one replayed before, and both meet when they are
// done.
//
// With room for three, rows of the next piece but one take the places of the piece that the other warp has left, all at
// once, and have a piece's time to arrive. With room for two, both meet four times in a piece, and rows of the next
// piece take the places of those that the other warp is done with. They are needed first row first, but places become
// free last row first: so a piece lies mirrored where the one before it in the same places does not.
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

  static constexpr int ahead = Plan::staged - 1;  // pieces by which copies are ahead of what is replayed
  static constexpr int parts = ahead > 1 ? 1 : 4, lap = Plan::depth, step_bytes = Stage::step_bytes;
  static_assert(Sweep::paired && (Stage::group == 32 || Stage::rows == 1), "whole warps copy for each other");
  static_assert(Plan::threads == 32, "a block is one pair, which meets at the barrier of the block");
  static_assert(Plan::scratch_in_shared, "both warps find states there");

  SRU_FN int steps_of_part(index_t every) { return int(Sweep::pieces(Sweep::pieces(every, parts), lap)) * lap; }
  SRU_FN int smaller(int a, int b) { return a < b ? a : b; }

  // Where piece number k lies: its first row, the way from a row to the next one, and what is known of its steps. One
  // lies in the same way `period` pieces on.
  static constexpr int period = 2 * Plan::staged;
  struct Place {
    unsigned char *first;
    int stride;
    Scratch states;

    SRU_MEMBER Place(const BackwardArguments<Cell> &f, const Part &at, int q, int k)
        : states(f, at, q, 0, Plan::staged * step_bytes) {
      extern __shared__ __align__(16) unsigned char sru_shared[];
      const int every = int(f.given.every);
      const bool mirrored = parts > 1 && k / Plan::staged % 2;
      first = sru_shared + (k % Plan::staged * every + (mirrored ? every - 1 : 0)) * step_bytes;
      stride = mirrored ? -step_bytes : step_bytes;
      states.advance(k % 2 * Scratch::values * every);
    }
  };

  // ----------------------------------------------------------------------------------------------------------------

  template <bool reverse>
  struct Copies : Stage::template Copies<reverse, true> {
    SRU_MEMBER Copies(const BackwardArguments<Cell> &f, const Part &at, const Span<reverse> &span, const Piece &piece)
        : Stage::template Copies<reverse, true>(f, at, span, piece) {}

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

  // Replays one piece after another, and copies one behind it meanwhile; the first ones behind none.
  template <bool reverse>
  SRU_FN void recompute(const BackwardArguments<Cell> &f, const Part &at, const Span<reverse> &span,
                        const Fixed &fixed) {
    const index_t offset = at.row(reverse) * Plan::d + at.j;
    const int of_part = steps_of_part(f.given.every);
    Pieces<reverse> all(f, span);
    Piece coming[ahead + 1] = {};  // that is replayed, the next one or two, of which the last one is copied
    coming[ahead] = all.next();
    Copies<reverse> copies(f, at, span, coming[ahead]);
    typename Sweep::template Pack<Saved> state[Cell::n_state] = {};
    Flags flags = {};
    for (int k = 0; coming[0].steps() + coming[1].steps() + coming[ahead].steps(); k++) {
      const Place here(f, at, reverse, k + period - ahead);
      typename Sweep::Replay replay = {fixed, here.states};
      for (int i = 0; i < Cell::n_state; i++) replay.state[i] = widen(state[i]);
      const Marks marks(flags);
      if (coming[1].steps()) coming[1].read(f, offset, state);
      flags.read(f.given, at, span, coming[1]);
      const Place there(f, at, reverse, k);
      copies.begin(coming[ahead], there.first, there.stride);
      typename Stage::Forwards rows = {here.first, here.stride, marks, 0};
      int left = coming[0].steps();
#pragma unroll 1
      for (int i = 0; i < parts; i++, left -= of_part) {
        cp_async_wait<ahead * parts - 1>();
        Stage::meet();
        Stage::template sweep<Plan::replay_depth>(rows, smaller(left, of_part), replay, [] {});
        ::meet();  // the partner
        copies.part(of_part);
      }
      for (int i = 0; i < ahead; i++) coming[i] = coming[i + 1];
      coming[ahead] = all.next();
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
    for (int i = 0; piece.steps() && i < (1 + ahead) * parts; i++) ::meet();  // the other one is at the first piece
    for (int k = 0; int left = piece.steps(); k++) {
      const Place here(f, at, reverse, k);
      const Marks marks(flags);
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
