// Small layers: the product U = W x and the recurrence in one kernel, which forms U in tiles of some steps in shared
// memory. A block takes one direction of one sequence. Its first warps have a thread for each channel and go over the
// steps; the others hold the weight in their registers and form the tile that comes next, meanwhile. U is rounded to
// the type of x, as it is where it is an array.
//
// A sum over d_in has the same order for all steps, sequences and batch sizes. What is not finite in x spoils the step
// that it belongs to, and no other.
#pragma once

#include "gpu_sweep.h"

// How the tensor cores multiply numbers of a type.
template <class T>
struct Multiply;
template <>
struct Multiply<float16> {
  SRU_FN void add(float *sum, const unsigned int *a, const unsigned int *b) { multiply_add_halves(sum, a, b); }
};
template <>
struct Multiply<bfloat16> {
  SRU_FN void add(float *sum, const unsigned int *a, const unsigned int *b) { multiply_add_bfloats(sum, a, b); }
};

template <class Cell, class Io, class Saved, unsigned wide, class Plan>
struct GpuSmall {
  typedef GpuSweep<Cell, Io, Saved, wide, Plan> Sweep;
  typedef typename Sweep::Given Given;
  typedef typename Sweep::Part Part;
  typedef typename Sweep::Row Row;
  typedef unsigned short half;  // the bits of a number of x, of the weight or of U
  static_assert(sizeof(Io) == sizeof(half) && Plan::width == 1, "tiles hold single channels of 16-bit numbers");

  // Steps of a tile, and tiles of x that are there or on their way; columns of U in one direction, eights of them, of
  // which one instruction forms 16 rows, and pieces of 32 of a row of x or the weight, which two instructions take.
  // sru_rt/small.py has the same numbers.
  static constexpr int tile = 16, stages = 4;
  static constexpr int columns = Cell::n_gates * Plan::d;
  static constexpr int octets = (columns + 7) / 8, pieces = (Plan::d_in + 31) / 32;
  static constexpr int step_threads = (Plan::d + 31) / 32 * 32, product_threads = Plan::threads - step_threads;
  static constexpr int product_warps = product_threads / 32, each = (octets + product_warps - 1) / product_warps;
  // Rows lie such that the lanes of a warp meet in no bank: those of x an odd multiple of 64 bytes apart, those of U 16
  // bytes more than a multiple of 128.
  static constexpr int x_row = (pieces | 1) * 32, u_row = (columns + 63) / 64 * 64 + 8;

  struct Memory {
    alignas(16) half x[stages][tile][x_row];
    alignas(16) half u[2][tile][u_row];
  };
  SRU_FN Memory &memory() {
    __shared__ Memory shared;
    return shared;
  }

  // ------------------------------------------------------------------------------------------------------------------
  // Products

  SRU_FN uint4 zeros() { return {0, 0, 0, 0}; }

  // Eight numbers of a row of d_in, zeros behind its end.
  SRU_FN uint4 eight(const half *row, int k) {
    if constexpr (Plan::d_in % 8 == 0) {
      return k < Plan::d_in ? *(const uint4 *)(row + k) : zeros();
    } else {
      unsigned int pairs[4];
      for (int i = 0; i < 4; i++) {
        const int low = k + 2 * i;
        pairs[i] = low < Plan::d_in ? row[low] : 0;
        if (low + 1 < Plan::d_in) pairs[i] |= (unsigned int)row[low + 1] << 16;
      }
      return {pairs[0], pairs[1], pairs[2], pairs[3]};
    }
  }

  // What a thread of the products does. Of 32 numbers of a row those from 8*c on are its lane's, for x and the weight
  // alike: the sum is the same whichever of them an instruction takes for which.
  template <bool reverse>
  struct Products {
    const ForwardArguments<Cell> &f;
    const Part &at;
    const typename Sweep::template Span<reverse> &span;
    int thread, warp, g, c;
    uint4 weight[each][pieces];

    SRU_MEMBER Products(const ForwardArguments<Cell> &f, const Part &at,
                        const typename Sweep::template Span<reverse> &span)
        : f(f), at(at), span(span), thread(int(threadIdx.x) - step_threads) {
      warp = thread / 32, g = thread % 32 / 4, c = thread % 4;
    }

    SRU_MEMBER void load_weight() {
      const half *const mine = (const half *)f.weight + index_t(reverse) * columns * Plan::d_in;
#pragma unroll
      for (int i = 0; i < each; i++)
#pragma unroll
        for (int p = 0; p < pieces; p++) {
          const int column = 8 * (warp + i * product_warps) + g;
          weight[i][p] = column < columns ? eight(mine + index_t(column) * Plan::d_in, 32 * p + 8 * c) : zeros();
        }
    }

    // The columns of x that only fill up a piece.
    SRU_MEMBER void clear_padding() {
      constexpr int first = (Plan::d_in + 7) / 8, count = pieces * 4 - first;
      if constexpr (count > 0)
        for (int i = thread; i < stages * tile * count; i += product_threads) {
          const int row = i / count;
          *(uint4 *)(memory().x[row / tile][row % tile] + 8 * (first + i % count)) = zeros();
        }
    }

    // Begins to copy the rows of x of tile `t`, as far as there are any.
    SRU_MEMBER void fetch(int t) {
      constexpr int count = (Plan::d_in + 7) / 8;
      const index_t left = span.end - span.begin - index_t(t) * tile;
      for (int i = thread; i < tile * count; i += product_threads) {
        const int row = i / count, k = 8 * (i % count);
        if (row >= left) break;
        const index_t time = span.time(span.begin + index_t(t) * tile + row);
        const half *const from = (const half *)f.x + (time * Sweep::batch(f.given) + at.b) * Plan::d_in;
        half *const to = memory().x[t % stages][row] + k;
        if (Plan::d_in % 8 == 0)
          cp_async_16(to, from + k);
        else
          *(uint4 *)to = eight(from, k);
      }
      cp_async_commit();
    }

    SRU_MEMBER void form(int t) {
      float sum[each][4] = {};
      const half *const x = memory().x[t % stages][g] + 8 * c;
#pragma unroll
      for (int p = 0; p < pieces; p++) {
        const uint4 above = *(const uint4 *)(x + 32 * p), below = *(const uint4 *)(x + 8 * x_row + 32 * p);
        const unsigned int a[2][4] = {{above.x, below.x, above.y, below.y}, {above.z, below.z, above.w, below.w}};
#pragma unroll
        for (int i = 0; i < each; i++) {
          const unsigned int b[2][2] = {{weight[i][p].x, weight[i][p].y}, {weight[i][p].z, weight[i][p].w}};
#pragma unroll
          for (int part = 0; part < 2; part++) Multiply<Io>::add(sum[i], a[part], b[part]);
        }
      }
#pragma unroll
      for (int i = 0; i < each; i++) {
        const int octet = warp + i * product_warps;
#pragma unroll
        for (int part = 0; part < 2 && octet < octets; part++) {
          Vec<float, 2> pair;
          pair.v[0] = sum[i][2 * part], pair.v[1] = sum[i][2 * part + 1];
          *(unsigned int *)(memory().u[t % 2][g + 8 * part] + 8 * octet + 2 * c) = narrow<Io>(pair).words;
        }
      }
    }
  };

  SRU_FN int tiles(index_t steps) { return int((steps + tile - 1) / tile); }

  // If there are steps at all, all threads meet once where the first tile of x is there, and once more for each tile of
  // U: where it is there, and the one before it is not needed any more.
  SRU_FN int meetings(index_t steps) { return steps ? tiles(steps) + 1 : 0; }

  template <bool reverse>
  SRU_FN void products(const ForwardArguments<Cell> &f) {
    const Part at(f.given, blockIdx.x, 0);
    const typename Sweep::template Span<reverse> span(f.given, at, 0);
    const index_t n = span.end - span.begin;
    if (!n) return;
    Products<reverse> work(f, at, span);
    for (int t = 0; t < stages - 1; t++) work.fetch(t);
    work.load_weight();
    work.clear_padding();
    cp_async_wait<stages - 2>();
    meet();
    for (int t = 0; t < tiles(n); t++) {
      work.fetch(t + stages - 1);
      work.form(t);
      cp_async_wait<stages - 2>();
      meet();
    }
  }

  // ------------------------------------------------------------------------------------------------------------------
  // Steps

  // Completes rows, of which a sweep's ring has what is in memory, by their gates, which it reads `ahead` steps before.
  struct WithGates {
    static constexpr int ahead = 4;
    static_assert(Plan::depth % ahead == 0 && tile % ahead == 0, "places in a ring are constants");

    typename Sweep::Forward &work;
    int step, n;  // the first step of a lap; all of them
    half ring[ahead][Cell::n_gates];

    SRU_MEMBER WithGates(typename Sweep::Forward &work, index_t n) : work(work), step(0), n(int(n)) {}
    // Step `s`, to place k of the ring.
    SRU_MEMBER void read(int k, int s) {
      if (s >= n) return;
      if (k == 0 && s % tile == 0) meet();
      const half *const u = memory().u[s / tile % 2][s % tile] + threadIdx.x;
      for (int i = 0; i < Cell::n_gates; i++) ring[k][i] = u[i * Plan::d];
    }
    SRU_MEMBER void take(const Row &row, int k) {
      if (k == 0 && step == 0) {
        meet();
#pragma unroll
        for (int first = 0; first < ahead; first++) read(first, first);
      }
      Row whole = row;
      for (int i = 0; i < Cell::n_gates; i++) whole.gate[i].words = ring[k % ahead][i];
      work.take(whole, k);
      read(k % ahead, step + k + ahead);
    }
    SRU_MEMBER void advance(index_t k) {
      step += int(k);
      work.advance(k);
    }
  };

  template <bool reverse>
  SRU_FN void steps(const ForwardArguments<Cell> &f) {
    const Part at(f.given, blockIdx.x, threadIdx.x);
    const typename Sweep::template Span<reverse> span(f.given, at, 0);
    const index_t n = span.end - span.begin;
    if (at.idle) {
      for (int i = 0; i < meetings(n); i++) meet();
      return;
    }
    const typename Sweep::Fixed fixed(f.given, at, reverse);
    typename Sweep::Keeper keep(f, at, span);
    typename Sweep::Forward work = Sweep::forward_work(f, at, span, fixed, keep);
    Sweep::initial_state(f.given, at, reverse, work.state);
    typename Sweep::template Reader<reverse, !reverse, Sweep::others> from(f.given, at, span.time(span.begin));
    WithGates with_gates(work, n);
    Sweep::template sweep<Plan::depth>(from, n, with_gates);
    Sweep::write_padding(f, at, span);
    Sweep::write_last(f, at, reverse, work.state);
  }

  template <bool reverse>
  SRU_FN void direction(const ForwardArguments<Cell> &f) {
    if (threadIdx.x < step_threads)
      steps<reverse>(f);
    else
      products<reverse>(f);
  }
  SRU_FN void forward(const ForwardArguments<Cell> &f) {
    if (Plan::D == 1 || blockIdx.y == 0)
      direction<false>(f);
    else
      direction<true>(f);
  }
};

#define SRU_GPU_FORWARD_SMALL(Cell, Io, Saved, wide, Plan, bytes)                                        \
  static_assert(sizeof(ForwardArguments<Cell>) == bytes, "cuda/arguments.h and sru_rt/abi.py disagree"); \
  extern "C" __global__ void __launch_bounds__(Plan::threads, 1)                                         \
      forward(const __grid_constant__ ForwardArguments<Cell> f) {                                        \
    GpuSmall<Cell, Io, Saved, wide, Plan>::forward(f);                                                   \
  }
