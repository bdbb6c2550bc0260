// One token of a few sequences: U = W x and the step of the recurrence in one kernel.
//
// A warp forms the gates of one channel, for all sequences. Each lane reads every 32nd line of the channel's rows of
// the weight, into a ring of registers that is filled before anything waits, while the block fetches x into shared
// memory. Sums of lanes are added up pairwise, in an order that depends on nothing but d_in. U is rounded to `Io` as a
// product leaves it in memory, and then a lane for each sequence takes the step.
//
// Plan::line is the bytes of a load, Plan::depth the lines of each row that are read ahead.
#pragma once

#include "gpu_sweep.h"

// A line of so many bytes, as it is in memory.
template <int bytes>
struct Line;
template <>
struct Line<2> {
  typedef unsigned short type;
};
template <>
struct Line<4> {
  typedef unsigned int type;
};
template <>
struct Line<8> {
  typedef uint2 type;
};
template <>
struct Line<16> {
  typedef uint4 type;
};

// Its elements as numbers.
template <class Io>
SRU_FN void spread(unsigned short line, float *to) {
  to[0] = widen(Packed<Io, 1>{line}).v[0];
}
template <class Io>
SRU_FN void spread(unsigned int line, float *to) {
  if constexpr (sizeof(Io) == 4) {
    to[0] = __uint_as_float(line);
  } else {
    const Vec<float, 2> pair = widen(Packed<Io, 2>{line});
    to[0] = pair.v[0], to[1] = pair.v[1];
  }
}
template <class Io, class acc>
SRU_FN void spread(uint2 line, acc *to) {
  if constexpr (sizeof(Io) == 8)
    to[0] = __longlong_as_double((long long)((unsigned long long)line.y << 32 | line.x));
  else
    spread<Io>(line.x, to), spread<Io>(line.y, to + 4 / sizeof(Io));
}
template <class Io, class acc>
SRU_FN void spread(uint4 line, acc *to) {
  spread<Io>(make_uint2(line.x, line.y), to), spread<Io>(make_uint2(line.z, line.w), to + 8 / sizeof(Io));
}

template <class Cell, class Io, class Saved, unsigned wide, class Plan>
struct GpuDecode {
  typedef GpuSweep<Cell, Io, Saved, wide, Plan> Sweep;
  typedef typename Sweep::acc acc;
  typedef typename Sweep::real real;
  typedef typename Sweep::Part Part;
  typedef typename Line<Plan::line>::type line_type;
  static_assert(Plan::width == 1, "a warp has one channel");
  static_assert(Plan::d_in * sizeof(Io) % Plan::line == 0, "a row is a whole number of lines");

  static constexpr int B = Plan::B, k = Cell::n_gates, depth = Plan::depth;
  static constexpr int in_line = Plan::line / sizeof(Io), lines = Plan::d_in / in_line;  // elements, and lines of a row
  static constexpr int shares = B > 4 ? 8 : B > 2 ? 4 : B, lanes = 32 / shares;  // parts of a warp: see share_out()

  // A lane's lines of the rows of all gates of a channel.
  struct Lines {
    line_type gate[k];

    SRU_MEMBER void read(const line_type *p) {
      for (int i = 0; i < k; i++) gate[i] = load_now(p + i * Plan::d * lines);
    }
  };

  // What a lane has of the gates of all sequences.
  struct Sums {
    acc of[k][shares];

    SRU_MEMBER Sums() {
      for (int i = 0; i < k; i++)
        for (int b = 0; b < shares; b++) of[i][b] = 0;
    }

    // Adds the products with a line of each x, which lie `lines` apart.
    SRU_MEMBER void add(const Lines &weight, const line_type *x) {
      acc w[k][in_line];
      for (int i = 0; i < k; i++) spread<Io>(weight.gate[i], w[i]);
#pragma unroll
      for (int b = 0; b < B; b++) {
        acc token[in_line];
        spread<Io>(x[b * lines], token);
#pragma unroll
        for (int e = 0; e < in_line; e++)
#pragma unroll
          for (int i = 0; i < k; i++) of[i][b] = ::fma(w[i][e], token[e], of[i][b]);
      }
    }
  };

  // Of n sums that each lane has, that of all lanes, of number lane / (32 / n): while a lane has several, it gives away
  // half of them. So the order of a sum does not depend on n.
  template <int n, int by = 16>
  SRU_FN acc share_out(acc *sums, int lane) {
    if constexpr (by == 0) {
      return sums[0];
    } else if constexpr (n == 1) {
      sums[0] += __shfl_xor_sync(~0u, sums[0], by);
      return share_out<1, by / 2>(sums, lane);
    } else {
      const bool upper = lane & by;
#pragma unroll
      for (int b = 0; b < n / 2; b++) {
        const acc kept = upper ? sums[b + n / 2] : sums[b], given = upper ? sums[b] : sums[b + n / 2];
        sums[b] = kept + __shfl_xor_sync(~0u, given, by);
      }
      return share_out<n / 2, by / 2>(sums, lane);
    }
  }

  // What step() is given of the arrays over time, but the gates; by loads that a barrier keeps in front of it.
  SRU_FN void read_inputs(const RecurrenceArguments<Cell> &a, const Part &at, int q, typename Sweep::Row &row) {
    for (int i = 0; i < Cell::n_inputs; i++) {
      const index_t offset = at.row(q) * Plan::input_stride(i) + at.j;
      if (Sweep::is_wide(i))
        row.wide_input[i] = load_packed<acc, 1>((const acc *)a.input[i].data + offset);
      else
        row.input[i] = load_packed<Io, 1>((const Io *)a.input[i].data + offset);
    }
    row.padded = row.starts_anew = false;
  }

  // Brings what all sequences see to where the block shares it.
  SRU_FN void fetch(const line_type *from, line_type *x) {
    constexpr int n = B * lines, each = n / Plan::threads, rest = each * Plan::threads;
#pragma unroll 8
    for (int i = 0; i < each; i++) x[i * Plan::threads + threadIdx.x] = from[i * Plan::threads + threadIdx.x];
    if (rest < n && rest + int(threadIdx.x) < n) x[rest + threadIdx.x] = from[rest + threadIdx.x];
  }

  SRU_FN void decode(const ForwardArguments<Cell> &f) {
    __shared__ line_type x[B * lines];
    const int lane = threadIdx.x % 32, b = lane / lanes, q = Plan::D == 1 ? 0 : blockIdx.y;
    const index_t channel = index_t(blockIdx.x) * (Plan::threads / 32) + threadIdx.x / 32;
    // Where there is no such sequence or channel, the last one is read.
    const Part at(b < B ? b : B - 1, channel < Plan::d ? channel : Plan::d - 1);
    const bool steps = lane % lanes == 0 && b < B && channel < Plan::d;
    const line_type *const weight = (const line_type *)f.weight + (q * k * Plan::d + at.j) * lines + lane;
    const int n = lines / 32 + (lane < lines % 32);
    // What the kernel before does not write is on its way while that one runs, as a step of several layers is.
    if (lane * Plan::line % 128 == 0)
      for (int i = 0; i < k; i++)
        for (int s = 0; s < n; s++) prefetch_to_l2(weight + i * Plan::d * lines + 32 * s);
    wait_for_the_kernel_before();
    let_the_next_kernel_begin();
    const typename Sweep::Fixed fixed(f.given, at, q);
    typename Sweep::Row row;
    read_inputs(f.given, at, q, row);
    real state[Cell::n_state] = {};
    if (steps) Sweep::initial_state(f.given, at, q, state);  // whose memory may be that of the last state

    Lines ring[depth];
#pragma unroll
    for (int s = 0; s < depth; s++)
      if (s < n) ring[s].read(weight + 32 * s);
    fetch((const line_type *)f.x, x);
    __syncthreads();
    Sums sums;
    for (int first = 0; first < n; first += depth) {
#pragma unroll
      for (int s = 0; s < depth; s++) {
        const int line = first + s;
        if (line >= n) break;
        sums.add(ring[s], x + 32 * line + lane);
        if (line + depth < n) ring[s].read(weight + 32 * (line + depth));
      }
    }
    for (int i = 0; i < k; i++) {
      real gate;
      gate.v[0] = share_out<shares>(sums.of[i], lane);
      row.gate[i] = narrow<Io>(gate);
    }
    if (!steps) return;
    real h;
    Sweep::step(row, fixed, state, &h);
    store((Io *)f.h + at.row(q) * Plan::d + at.j, narrow<Io>(h));
    Sweep::write_last(f, at, q, state);
  }
};

// Here, too, `bytes` is the size that sru_rt/abi.py gives to the arguments.
#define SRU_GPU_FORWARD_DECODE(Cell, Io, Saved, wide, Plan, bytes)                                       \
  static_assert(sizeof(ForwardArguments<Cell>) == bytes, "cuda/arguments.h and sru_rt/abi.py disagree"); \
  extern "C" __global__ void __launch_bounds__(Plan::threads, 1)                                         \
      forward(const __grid_constant__ ForwardArguments<Cell> f) {                                        \
    GpuDecode<Cell, Io, Saved, wide, Plan>::decode(f);                                                   \
  }
