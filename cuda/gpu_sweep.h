// Sweeps over time on the GPU, for any cell. A thread owns a few neighbouring channels of one sequence and direction:
// it carries their state in registers from step to step, and reads ahead into a ring of registers, deep enough that
// memory is always busy. Neighbouring threads own neighbouring channels, so that a warp reads whole lines.
//
// `Plan` holds what is compiled in (see sru_rt/plan.py): sizes but L, strides, depths, and what is given and wanted, so
// that addresses are constants beside one pointer for each array.
#pragma once

#include "arguments.h"

template <class Cell, class Io, class Saved, unsigned wide, class Plan>
struct GpuSweep {
  typedef typename Storage<Io>::acc acc;
  typedef Vec<acc, Plan::width> real;
  typedef RecurrenceArguments<Cell> Given;
  static constexpr int width = Plan::width;
  static_assert(Plan::d % width == 0, "a pack of channels lies in one row");

  template <class T>
  using Pack = Packed<T, width>;

  // Sums over time that go to `partial`.
  static constexpr int n_sums = Cell::n_params + (Plan::parallel ? Cell::n_per_sequence : 0);

  SRU_FN constexpr bool is_wide(int i) { return (wide >> i) & 1; }
  SRU_FN constexpr bool is_narrow(int param) { return (Plan::narrow >> param) & 1; }
  SRU_FN index_t batch(const Given &a) { return Plan::B ? Plan::B : a.B; }
  SRU_FN index_t pieces(index_t steps, index_t of) { return (steps + of - 1) / of; }
  SRU_FN index_t chunks(const Given &a) { return pieces(a.L, a.chunk); }

  // The number of this thread in its block, which another one has, too, where two go over the same channels (see
  // gpu_pair.h).
  static constexpr bool paired = Plan::staged >= 2;
  SRU_FN unsigned thread() { return paired ? threadIdx.x % Plan::threads : threadIdx.x; }

  // The channels of this thread of a block, and the steps that exist: those of its sequence. The others are padding.
  static constexpr index_t packs = Plan::d / width;  // of a row
  struct Part {
    index_t b, j, length;
    bool idle;

    SRU_MEMBER Part(index_t b, index_t j) : b(b), j(j), length(1), idle(false) {}  // of one step
    SRU_MEMBER explicit Part(const Given &a, index_t block = blockIdx.x) {
      const index_t n = block * Plan::threads + thread();
      idle = n >= batch(a) * packs;
      b = n / packs;
      j = (n - b * packs) * width;
      length = a.L;
      if (a.lengths && !idle) length = clamp(a.lengths[b], 0, a.L);
    }
    // One channel of one sequence.
    SRU_MEMBER Part(const Given &a, index_t b, index_t j) : b(b), j(j), length(a.L), idle(j >= Plan::d) {
      if (a.lengths) length = clamp(a.lengths[b], 0, a.L);
    }
    SRU_MEMBER index_t row(int q) const { return b * Plan::D + q; }  // within one step
  };
  SRU_FN index_t clamp(index_t i, index_t low, index_t high) { return i < low ? low : i > high ? high : i; }

  // Steps from `from` to `to` of one direction, counted as it goes: all, or those of a chunk where Plan::parallel.
  // Among them, those from `begin` to `end` are of the sequence, whose own ones begin with `first`.
  template <bool reverse>
  struct Span {
    index_t L, length, chunk, from, to, first, begin, end;

    SRU_MEMBER Span(const Given &a, const Part &at, index_t chunk) : L(a.L), length(at.length), chunk(chunk) {
      from = 0, to = L;
      first = begin = reverse ? L - length : 0;
      end = first + length;
      if (Plan::parallel) {
        from = chunk * a.chunk, to = clamp(from + a.chunk, 0, L);
        begin = clamp(begin, from, to), end = clamp(end, from, to);
      }
    }
    SRU_MEMBER index_t time(index_t step) const { return reverse ? L - 1 - step : step; }
    SRU_MEMBER bool is_first() const { return !Plan::parallel || from == 0; }
    SRU_MEMBER bool is_last() const { return !Plan::parallel || to == L; }
    // Padding are the times from here until `padding_end()`.
    SRU_MEMBER index_t padding_begin() const {
      return Plan::parallel ? clamp(reverse ? L - to : from, length, L) : length;
    }
    SRU_MEMBER index_t padding_end() const { return Plan::parallel ? (reverse ? L - from : to) : L; }
  };

  // The offset of a thread's channels in an array of states (D, B, d).
  SRU_FN index_t state_offset(const Given &a, const Part &at, int q) { return (q * batch(a) + at.b) * Plan::d + at.j; }

  // What is read once has no demands on its alignment.
  template <class T>
  SRU_FN real read_each(const T *p) {
    real x;
    for (int i = 0; i < width; i++) x.v[i] = widen(load_packed<T, 1>(p + i)).v[0];
    return x;
  }
  SRU_FN void write_each(acc *p, real x) {
    for (int i = 0; i < width; i++) p[i] = x.v[i];
  }

  // Where rows are that one chunk of time leaves to another: see gpu_scan.h and gpu_shoot.h.
  static constexpr int carry_rows = Cell::n_state * (Plan::shoots ? 3 : Cell::n_state + 1);
  SRU_FN acc *carry(const Given &a, const Part &at, int q, index_t chunk, int i) {
    return (acc *)a.carry + ((chunk * carry_rows + i) * batch(a) * Plan::D + at.row(q)) * Plan::d + at.j;
  }

  // What step() is given beside the arrays over time.
  struct Fixed {
    real per_sequence[SRU_AT_LEAST_ONE(Cell::n_per_sequence)], param[SRU_AT_LEAST_ONE(Cell::n_params)];
    real constant[SRU_AT_LEAST_ONE(Cell::n_constants)];

    SRU_MEMBER Fixed(const Given &a, const Part &at, int q) {
      for (int i = 0; i < Cell::n_per_sequence; i++)
        per_sequence[i] = read_each((const acc *)a.per_sequence[i].data + at.row(q) * a.per_sequence[i].stride + at.j);
      for (int i = 0; i < Cell::n_params; i++) {
        const index_t offset = q * a.param[i].stride + at.j;
        param[i] = is_narrow(i) ? read_each((const Io *)a.param[i].data + offset)
                                : read_each((const acc *)a.param[i].data + offset);
      }
      for (int i = 0; i < Cell::n_constants; i++) constant[i] = real(a.constant[i]);
    }
  };

  // ----------------------------------------------------------------------------------------------------------------
  // Reading ahead

  // One step of the arrays over time, as it is in memory.
  struct Row {
    Pack<Io> gate[SRU_AT_LEAST_ONE(Cell::n_gates)], input[SRU_AT_LEAST_ONE(Cell::n_inputs)];
    Pack<acc> wide_input[SRU_AT_LEAST_ONE(Cell::n_inputs)];
    bool padded, starts_anew;
  };

  // The same as numbers.
  struct Values {
    real gate[SRU_AT_LEAST_ONE(Cell::n_gates)], input[SRU_AT_LEAST_ONE(Cell::n_inputs)];

    SRU_MEMBER explicit Values(const Row &row) {
      for (int i = 0; i < Cell::n_gates; i++) gate[i] = widen(row.gate[i]);
      for (int i = 0; i < Cell::n_inputs; i++) input[i] = is_wide(i) ? widen(row.wide_input[i]) : widen(row.input[i]);
    }
  };

  // What a sweep reads of a row: where a chunk is gone over twice, at first what goes to shared memory (see
  // gpu_tile.h), and then the others.
  enum Which { all, in_tile, others };
  static constexpr int bit_of_dh = Cell::n_gates + Cell::n_inputs;
  SRU_FN constexpr bool is_in_tile(int bit) { return (Plan::in_tile >> bit) & 1; }
  SRU_FN constexpr bool reads(Which which, int bit) { return which == all || is_in_tile(bit) == (which == in_tile); }

  // Reads rows of direction `reverse` from time `t` on, upwards in time or downwards.
  template <bool reverse, bool upwards, Which which = all>
  struct Reader {
    const Given &a;
    index_t t, length, rows;  // `rows` of one step lie between two steps of a sequence
    const Io *gate;
    const void *input[SRU_AT_LEAST_ONE(Cell::n_inputs)];
    const unsigned char *mask, *reset;

    SRU_MEMBER Reader(const Given &a, const Part &at, index_t t) : a(a), t(t), length(at.length) {
      rows = (upwards ? 1 : -1) * batch(a) * Plan::D;
      const index_t row = t * batch(a) * Plan::D + at.row(reverse);
      gate = (const Io *)a.gate[0].data + row * Plan::gate_stride + at.j;
      for (int i = 0; i < Cell::n_inputs; i++) {
        const index_t offset = row * Plan::input_stride(i) + at.j;
        input[i] = is_wide(i) ? (const void *)((const acc *)a.input[i].data + offset)
                              : (const void *)((const Io *)a.input[i].data + offset);
      }
      // A boundary stands before step t; the reverse direction crosses it on its way from t to t - 1.
      if (Plan::has_mask) mask = a.mask + t * batch(a) + at.b;
      if (Plan::has_reset) reset = a.reset + (t + reverse) * batch(a) + at.b;
    }

    // The row k steps on.
    SRU_MEMBER Row read(index_t k) const {
      Row row;
      for (int i = 0; i < Cell::n_gates; i++)
        if (reads(which, i))
          row.gate[i] = load_once_packed<Io, width>(gate + k * rows * Plan::gate_stride + i * Plan::d);
      for (int i = 0; i < Cell::n_inputs; i++) {
        if (!reads(which, Cell::n_gates + i)) continue;
        const index_t offset = k * rows * Plan::input_stride(i);
        if (is_wide(i))
          row.wide_input[i] = load_once_packed<acc, width>((const acc *)input[i] + offset);
        else
          row.input[i] = load_once_packed<Io, width>((const Io *)input[i] + offset);
      }
      row.padded = padded(k);
      row.starts_anew = starts_anew(k);
      return row;
    }
    SRU_MEMBER bool padded(index_t k) const { return Plan::has_mask && mask[(upwards ? k : -k) * batch(a)]; }
    SRU_MEMBER bool starts_anew(index_t k) const {
      const index_t step = upwards ? k : -k;
      return Plan::has_reset && (!reverse || t + step + 1 < length) && reset[step * batch(a)];
    }
    SRU_MEMBER void advance(index_t k) {
      gate += k * rows * Plan::gate_stride;
      for (int i = 0; i < Cell::n_inputs; i++) {
        const index_t offset = k * rows * Plan::input_stride(i);
        input[i] =
            is_wide(i) ? (const void *)((const acc *)input[i] + offset) : (const void *)((const Io *)input[i] + offset);
      }
      t += upwards ? k : -k;
      if (Plan::has_mask) mask += (upwards ? k : -k) * batch(a);
      if (Plan::has_reset) reset += (upwards ? k : -k) * batch(a);
    }
  };

  // Calls work.take(row, k) for n rows in turn, which are read `depth` rows ahead. k counts from the last call of
  // work.advance() on. The ring is only ever indexed by constants, so that it stays in registers. The way out before
  // each step also keeps the assembler from gathering the loads of a whole lap at its top, which took twice the
  // registers. With `may_stop` it ends after the row with which work.stopped becomes true.
  template <int depth, bool may_stop = false, class From, class Work>
  SRU_FN void sweep(From &from, index_t n, Work &work) {
    decltype(from.read(0)) ring[depth];
    int left = int(n);
#pragma unroll
    for (int k = 0; k < depth; k++)
      if (k < left) ring[k] = from.read(k);
    while (true) {
#pragma unroll
      for (int k = 0; k < depth; k++) {
        if (k >= left) return;
        work.take(ring[k], k);
        if constexpr (may_stop)
          if (work.stopped) return;
        if (k + depth < left) ring[k] = from.read(k + depth);
      }
      from.advance(depth);
      work.advance(depth);
      left -= depth;
    }
  }

  // ----------------------------------------------------------------------------------------------------------------
  // Forward

  // The state after one step, and h; and the activations, if they are wanted.
  SRU_FN void step(const Row &row, const Fixed &fixed, real *state, real *h, real *activation = nullptr) {
    const Values in(row);
    real new_state[Cell::n_state];
    for (int i = 0; i < Cell::n_state; i++)
      if (row.starts_anew) state[i] = real(0);
    Cell::template step<real>(in.gate, in.input, fixed.per_sequence, fixed.param, state, fixed.constant, new_state, h,
                              activation);
    for (int i = 0; i < Cell::n_state; i++)
      if (!row.padded) state[i] = new_state[i];
    if (row.padded) *h = real(0);
  }

  // Copies of the state for the backward, before steps 0, every, 2*every, ... of a span; where Plan::shoots, of the
  // direction, as chunks then begin with the very state that the steps before them lead to.
  struct Keeper {
    Saved *to[Cell::n_state];  // the next copy; where Plan::keep is 1, that of the first step of a lap
    index_t rows;
    int every, left;  // `left` steps from now is the next copy

    template <bool reverse>
    SRU_MEMBER Keeper(const ForwardArguments<Cell> &f, const Part &at, const Span<reverse> &span) : left(0) {
      rows = batch(f.given) * Plan::D * Plan::d;
      every = Plan::keep == 1 ? 1 : int(f.given.every);
      index_t before = 0;
      if (Plan::parallel && Plan::keep) before = span.chunk * pieces(f.given.chunk, every);
      if (Plan::shoots && Plan::keep) before = pieces(span.from, every), left = int(before * every - span.from);
      for (int i = 0; Plan::keep && i < Cell::n_state; i++)
        to[i] = (Saved *)f.saved[i] + before * rows + at.row(reverse) * Plan::d + at.j;
    }
    // Before step k of a lap.
    SRU_MEMBER void before_step(const real *state, int k) {
      if (Plan::keep == 1)
        for (int i = 0; i < Cell::n_state; i++) store_once(to[i] + k * rows, narrow<Saved>(state[i]));
      if (Plan::keep > 1) {
        if (left == 0) copy(state);
        left--;
      }
    }
    SRU_MEMBER void advance(index_t k) {
      if (Plan::keep == 1)
        for (int i = 0; i < Cell::n_state; i++) to[i] += k * rows;
    }
    // `n` steps of padding, which nothing passes but the state.
    SRU_MEMBER void skip(const real *state, int n) {
      if constexpr (Plan::keep != 0) {
        while (n > left) {
          n -= left;
          copy(state);
        }
        left -= n;
      }
    }
    SRU_MEMBER void copy(const real *state) {
      for (int i = 0; i < Cell::n_state; i++) {
        store_once(to[i], narrow<Saved>(state[i]));
        to[i] += rows;
      }
      left = every;
    }
  };

  struct Forward {
    const Fixed &fixed;
    Keeper &keep;
    Io *h;
    index_t h_step;
    real state[Cell::n_state];

    SRU_MEMBER void take(const Row &row, int k) {
      keep.before_step(state, k);
      real new_h;
      step(row, fixed, state, &new_h);
      store(h + k * h_step, narrow<Io>(new_h));
    }
    SRU_MEMBER void advance(index_t k) {
      keep.advance(k);
      h += k * h_step;
    }
  };

  SRU_FN void initial_state(const Given &a, const Part &at, int q, real *state) {
    for (int i = 0; i < Cell::n_state; i++)
      state[i] = a.c0[i] ? read_each((const acc *)a.c0[i] + state_offset(a, at, q)) : real(0);
  }

  // The state before a span. Chunks take it from where fold() has left it, the first one too: `c_last` may be the
  // memory of `c0`, and the last chunk may be done before the first one begins.
  template <bool reverse>
  SRU_FN void start_state(const Given &a, const Part &at, const Span<reverse> &span, real *state) {
    if (Plan::parallel)
      for (int i = 0; i < Cell::n_state; i++)
        state[i] = widen(load_packed<acc, width>(carry(a, at, reverse, (span.chunk ? span.chunk : chunks(a)) - 1, i)));
    else
      initial_state(a, at, reverse, state);
  }

  // What begins a span, with whatever there is in `state`.
  template <bool reverse>
  SRU_FN Forward forward_work(const ForwardArguments<Cell> &f, const Part &at, const Span<reverse> &span,
                              const Fixed &fixed, Keeper &keep) {
    const index_t rows = batch(f.given) * Plan::D * Plan::d, first = span.time(span.begin);
    return {fixed, keep, (Io *)f.h + (first * rows + at.row(reverse) * Plan::d + at.j), reverse ? -rows : rows};
  }

  // What rows are given to: the work, unless it is to be something around it.
  struct Plainly {
    template <class Work>
    SRU_MEMBER Work &operator()(Work &work) const {
      return work;
    }
  };

  // Takes work.state over a span, unless work.stopped becomes true on the way, and writes zeros for padding.
  // around(work) is what rows are given to.
  template <int depth, bool may_stop = false, Which which = all, bool reverse, class Work, class Around = Plainly>
  SRU_FN void forward_span(const ForwardArguments<Cell> &f, const Part &at, const Span<reverse> &span, Work &work,
                           Around around = {}) {
    const index_t n = span.end - span.begin;
    if (reverse) work.keep.skip(work.state, int(span.begin - span.from));
    Reader<reverse, !reverse, which> from(f.given, at, span.time(span.begin));
    auto &&taker = around(work);
    sweep<depth, may_stop>(from, n, taker);
    if constexpr (may_stop)
      if (work.stopped) return;
    if (!reverse) {
      work.keep.advance(n % depth);  // of the last lap
      work.keep.skip(work.state, int(span.to - span.end));
    }
    write_padding(f, at, span);
  }
  template <bool reverse>
  SRU_FN void write_padding(const ForwardArguments<Cell> &f, const Part &at, const Span<reverse> &span) {
    const index_t rows = batch(f.given) * Plan::D * Plan::d;
    Io *const h = (Io *)f.h + at.row(reverse) * Plan::d + at.j;
#pragma unroll 1
    for (index_t t = span.padding_begin(); t < span.padding_end(); t++) store(h + t * rows, narrow<Io>(real(0)));
  }
  SRU_FN void write_last(const ForwardArguments<Cell> &f, const Part &at, int q, const real *state) {
    for (int i = 0; i < Cell::n_state; i++) write_each((acc *)f.c_last[i] + state_offset(f.given, at, q), state[i]);
  }

  template <bool reverse>
  SRU_FN void forward_direction(const ForwardArguments<Cell> &f) {
    const Given &a = f.given;
    const Part at(a);
    if (at.idle) return;
    const Span<reverse> span(a, at, blockIdx.z);
    const Fixed fixed(a, at, reverse);
    Keeper keep(f, at, span);
    Forward work = forward_work(f, at, span, fixed, keep);
    start_state(a, at, span, work.state);
    forward_span<Plan::depth>(f, at, span, work);
    if (span.is_last()) write_last(f, at, reverse, work.state);
  }

  // Takes a state over steps of which nothing else is wanted.
  struct Passage {
    const Fixed &fixed;
    real state[Cell::n_state];

    SRU_MEMBER void take(const Row &row, int) {
      real h;
      step(row, fixed, state, &h);
    }
    SRU_MEMBER void advance(index_t) {}
  };

  template <int depth, bool reverse>
  SRU_FN void pass(const Given &a, const Part &at, const Span<reverse> &span, const Fixed &fixed, index_t begin,
                   index_t end, real *state) {
    Passage work = {fixed};
    for (int i = 0; i < Cell::n_state; i++) work.state[i] = state[i];
    Reader<reverse, !reverse> from(a, at, span.time(begin));
    sweep<depth>(from, end - begin, work);
    for (int i = 0; i < Cell::n_state; i++) state[i] = work.state[i];
  }

  SRU_FN void forward(const ForwardArguments<Cell> &f) {
    if (Plan::D == 1 || blockIdx.y == 0)
      forward_direction<false>(f);
    else
      forward_direction<true>(f);
  }

  // ----------------------------------------------------------------------------------------------------------------
  // Backward

  // A row, the gradient of h there, the states before the step, and activations that are known.
  template <class State>
  struct BackRow {
    Row row;
    Pack<Io> dh;
    Pack<State> state[Cell::n_state], activation[SRU_AT_LEAST_ONE(Plan::known)];
  };

  // Reads rows against the direction of the recurrence. `State` is the type of the states that it reads: `Saved`, or
  // `acc` where this kernel has recomputed them.
  template <bool reverse, class State, Which which = all>
  struct BackReader {
    Reader<reverse, reverse, which> rows;
    const Io *dh;
    const State *state[Cell::n_state];
    index_t dh_step, state_step;

    SRU_MEMBER BackRow<State> read(index_t k) const {
      BackRow<State> back;
      back.row = rows.read(k);
      if (reads(which, bit_of_dh)) back.dh = load_once_packed<Io, width>(dh + k * dh_step);
      for (int i = 0; i < Cell::n_state; i++) {
        if (!reads(which, bit_of_dh + 1 + i)) continue;
        back.state[i] = Plan::keep == 1 ? load_once_packed<State, width>(state[i] - k * state_step)
                                        : load_packed<State, width>(state[i] - k * state_step);
      }
      return back;
    }
    SRU_MEMBER void advance(index_t k) {
      rows.advance(k);
      dh += k * dh_step;
      for (int i = 0; i < Cell::n_state; i++) state[i] -= k * state_step;
    }
  };

  // The state before the step of a row.
  template <class State>
  SRU_FN void state_before(const BackRow<State> &back, real *state) {
    for (int i = 0; i < Cell::n_state; i++) state[i] = back.row.starts_anew ? real(0) : real(widen(back.state[i]));
  }

  // The adjoint of the state after a span: what was given of the last state, or what fold() has left.
  template <bool reverse>
  SRU_FN void end_adjoint(const BackwardArguments<Cell> &f, const Part &at, const Span<reverse> &span, real *dstate) {
    for (int i = 0; i < Cell::n_state; i++) {
      if (span.is_last())
        dstate[i] = f.dc_last[i] ? read_each((const acc *)f.dc_last[i] + state_offset(f.given, at, reverse)) : real(0);
      else
        dstate[i] = widen(load_packed<acc, width>(carry(f.given, at, reverse, span.chunk, i)));
    }
  }

  SRU_FN constexpr bool wants_input(int i) { return (Plan::wants_inputs >> i) & 1; }

  // The adjoint of the state, the sums over time, and where the gradients of the next step go.
  template <bool reverse>
  struct Backward {
    const Fixed &fixed;
    Io *dgate;
    void *dinput[SRU_AT_LEAST_ONE(Cell::n_inputs)];
    index_t rows;
    real dstate[Cell::n_state];
    real dper_sequence[SRU_AT_LEAST_ONE(Cell::n_per_sequence)], dparam[SRU_AT_LEAST_ONE(Cell::n_params)];

    SRU_MEMBER Backward(const BackwardArguments<Cell> &f, const Part &at, const Span<reverse> &span, const Fixed &fixed,
                        const real *end)
        : fixed(fixed) {
      rows = (reverse ? 1 : -1) * batch(f.given) * Plan::D;
      start(f, at, span.time(span.end - 1));
      for (int i = 0; i < Cell::n_state; i++) dstate[i] = end[i];
      for (int i = 0; i < Cell::n_per_sequence; i++) dper_sequence[i] = real(0);
      for (int i = 0; i < Cell::n_params; i++) dparam[i] = real(0);
    }
    // Goes to the rows of time `t`.
    SRU_MEMBER void start(const BackwardArguments<Cell> &f, const Part &at, index_t t) {
      const index_t row = t * batch(f.given) * Plan::D + at.row(reverse);
      if (Plan::wants_gates) dgate = (Io *)f.dgate[0].data + row * Plan::gate_stride + at.j;
      for (int i = 0; i < Cell::n_inputs; i++) {
        if (!wants_input(i)) continue;
        const index_t offset = row * Plan::input_stride(i) + at.j;
        dinput[i] = is_wide(i) ? (void *)((acc *)f.dinput[i].data + offset) : (void *)((Io *)f.dinput[i].data + offset);
      }
    }

    template <class State>
    SRU_MEMBER void take(const BackRow<State> &back, int k) {
      real dgates[SRU_AT_LEAST_ONE(Cell::n_gates)], dinputs[SRU_AT_LEAST_ONE(Cell::n_inputs)];
      for (int i = 0; i < Cell::n_gates; i++) dgates[i] = real(0);
      for (int i = 0; i < Cell::n_inputs; i++) dinputs[i] = real(0);
      if (!back.row.padded) gradient(back, dgates, dinputs);
      for (int i = 0; i < Cell::n_state; i++)
        if (back.row.starts_anew) dstate[i] = real(0);
      write(dgates, dinputs, k);
    }

    template <class State>
    SRU_MEMBER void gradient(const BackRow<State> &back, real *dgates, real *dinputs) {
      const Values in(back.row);
      real state[Cell::n_state], dold_state[Cell::n_state];
      real dper_step[SRU_AT_LEAST_ONE(Cell::n_per_sequence)], dparams[SRU_AT_LEAST_ONE(Cell::n_params)];
      real activation[SRU_AT_LEAST_ONE(Plan::known)];
      state_before(back, state);
      for (int i = 0; i < Plan::known; i++) activation[i] = widen(back.activation[i]);
      const real dh = widen(back.dh);
      Cell::template gradient<real, Plan::known>(in.gate, in.input, fixed.per_sequence, fixed.param, state,
                                                 fixed.constant, dstate, &dh, dgates, dinputs, dper_step, dparams,
                                                 dold_state, activation);
      for (int i = 0; i < Cell::n_state; i++) dstate[i] = dold_state[i];
      for (int i = 0; i < Cell::n_per_sequence; i++) dper_sequence[i] = dper_sequence[i] + dper_step[i];
      for (int i = 0; i < Cell::n_params; i++) dparam[i] = dparam[i] + dparams[i];
    }

    SRU_MEMBER void write(const real *dgates, const real *dinputs, int k) {
      if (Plan::wants_gates)
        for (int i = 0; i < Cell::n_gates; i++)
          store(dgate + k * rows * Plan::gate_stride + i * Plan::d, narrow<Io>(dgates[i]));
      for (int i = 0; i < Cell::n_inputs; i++) {
        if (!wants_input(i)) continue;
        const index_t offset = k * rows * Plan::input_stride(i);
        if (is_wide(i))
          store((acc *)dinput[i] + offset, narrow<acc>(dinputs[i]));
        else
          store((Io *)dinput[i] + offset, narrow<Io>(dinputs[i]));
      }
    }
    SRU_MEMBER void advance(index_t k) {
      if (Plan::wants_gates) dgate += k * rows * Plan::gate_stride;
      for (int i = 0; i < Cell::n_inputs; i++) {
        if (!wants_input(i)) continue;
        const index_t offset = k * rows * Plan::input_stride(i);
        dinput[i] = is_wide(i) ? (void *)((acc *)dinput[i] + offset) : (void *)((Io *)dinput[i] + offset);
      }
    }

    // Zeros for the rows of padding.
    SRU_MEMBER void pad(const BackwardArguments<Cell> &f, const Part &at, const Span<reverse> &span) {
      real dgates[SRU_AT_LEAST_ONE(Cell::n_gates)], dinputs[SRU_AT_LEAST_ONE(Cell::n_inputs)];
      for (int i = 0; i < Cell::n_gates; i++) dgates[i] = real(0);
      for (int i = 0; i < Cell::n_inputs; i++) dinputs[i] = real(0);
#pragma unroll 1
      for (index_t t = span.padding_begin(); t < span.padding_end(); t++) {
        start(f, at, t);
        write(dgates, dinputs, 0);
      }
    }
    SRU_MEMBER void finish(const BackwardArguments<Cell> &f, const Part &at, const Span<reverse> &span) const {
      for (int i = 0; span.is_first() && i < Cell::n_state; i++)
        write_each((acc *)f.dc0[i] + state_offset(f.given, at, reverse), dstate[i]);
      const index_t row = (Plan::parallel ? span.chunk * batch(f.given) * Plan::D : 0) + at.row(reverse);
      acc *const partial = (acc *)f.partial.data + row * n_sums * f.partial.stride + at.j;
      for (int i = 0; i < Cell::n_per_sequence; i++) {
        const Slot &to = f.dper_sequence[i];
        if (!to.data) continue;
        if (Plan::parallel)
          write_each(partial + (Cell::n_params + i) * f.partial.stride, dper_sequence[i]);
        else
          write_each((acc *)to.data + at.row(reverse) * to.stride + at.j, dper_sequence[i]);
      }
      for (int i = 0; i < Cell::n_params; i++)
        if (f.dparam[i].data) write_each(partial + i * f.partial.stride, dparam[i]);
    }
  };

  // Reads from step `last` on the rows and the states that the forward kept before every step. (Where it kept only
  // some, `work` needs none: it is shown the first one each time.)
  template <bool reverse, Which which = all>
  SRU_FN BackReader<reverse, Saved, which> back_reader(const BackwardArguments<Cell> &f, const Part &at,
                                                       const Span<reverse> &span, index_t last) {
    const index_t rows = batch(f.given) * Plan::D * Plan::d, t = span.time(last);
    const index_t offset = at.row(reverse) * Plan::d + at.j, s = Plan::keep == 1 ? last : 0;
    BackReader<reverse, Saved, which> from = {{f.given, at, t}, (const Io *)f.dh + t * rows + offset};
    for (int i = 0; i < Cell::n_state; i++) from.state[i] = (const Saved *)f.saved[i] + s * rows + offset;
    from.dh_step = reverse ? rows : -rows;
    from.state_step = Plan::keep == 1 ? rows : 0;
    return from;
  }
  template <int depth, Which which = all, bool reverse, class Work>
  SRU_FN void backward_from_saved(const BackwardArguments<Cell> &f, const Part &at, const Span<reverse> &span,
                                  Work &work) {
    auto from = back_reader<reverse, which>(f, at, span, span.end - 1);
    sweep<depth>(from, span.end - span.begin, work);
  }

  // The states before the steps of one piece, recomputed, with activations of the steps: in shared memory, behind
  // `before` bytes for a step of a piece, or in the scratch that was given.
  struct Scratch {
    static constexpr int values = Cell::n_state + Plan::known;  // of a step
    acc *value[values];                                         // states first
    index_t step;

    SRU_MEMBER Scratch(const BackwardArguments<Cell> &f, const Part &at, int q, index_t chunk, int before = 0) {
      extern __shared__ __align__(16) unsigned char sru_shared[];
      const Given &a = f.given;
      step = Plan::scratch_in_shared ? Plan::threads * width : batch(a) * Plan::D * Plan::d;
      index_t row = at.row(q) * Plan::d + at.j;
      if (Plan::parallel) row += chunk * clamp(a.every, 0, a.chunk) * step;
      acc *const shared = (acc *)(sru_shared + a.every * before) + thread() * width;
      for (int i = 0; i < values; i++)
        value[i] = Plan::scratch_in_shared ? shared + i * a.every * step : (acc *)f.states[i] + row;
    }
    SRU_MEMBER void advance(index_t k) {
      for (int i = 0; i < values; i++) value[i] += k * step;
    }
  };

  struct Replay {
    const Fixed &fixed;
    Scratch to;
    real state[Cell::n_state];

    SRU_MEMBER void take(const Row &row, int k) {
      for (int i = 0; i < Cell::n_state; i++) store(to.value[i] + k * to.step, narrow<acc>(state[i]));
      real h, activation[SRU_AT_LEAST_ONE(Cell::n_activations)];
      step(row, fixed, state, &h, activation);
      for (int i = 0; i < Plan::known; i++)
        store(to.value[Cell::n_state + i] + k * to.step, narrow<acc>(activation[i]));
    }
    SRU_MEMBER void advance(index_t k) { to.advance(k); }
  };

  // Steps from `first` to `last`, and the number of the state kept before step `kept`. Both are the same, unless that
  // one lies before the span. No steps: there are no more pieces.
  struct Piece {
    index_t kept, first, last, copy;

    SRU_MEMBER int steps() const { return int(last - first); }
    SRU_MEMBER void read(const BackwardArguments<Cell> &f, index_t row, Pack<Saved> *state) const {
      for (int i = 0; i < Cell::n_state; i++)
        state[i] =
            load_once_packed<Saved, width>((const Saved *)f.saved[i] + copy * batch(f.given) * Plan::D * Plan::d + row);
    }
  };

  // The pieces of a span, last piece first. They begin anew with each chunk of the forward, as this began with a state
  // that is not, to the last bit, what the steps before it lead to.
  template <bool reverse>
  struct Pieces {
    const BackwardArguments<Cell> &f;
    const Span<reverse> &span;
    index_t last, start, copies;  // of a chunk of the forward: its first step, and the states kept of earlier ones
    index_t left;                 // pieces of it

    SRU_MEMBER Pieces(const BackwardArguments<Cell> &f, const Span<reverse> &span)
        : f(f), span(span), last(span.end), start(0), copies(0) {
      if (Plan::saved_in_chunks && span.end > span.begin) {
        const index_t chunk = (span.end - 1) / f.saved_chunk;
        start = chunk * f.saved_chunk, copies = chunk * pieces(f.saved_chunk, f.given.every);
      }
      left = unsigned(last - 1 - start) / unsigned(f.given.every) + 1;
    }
    SRU_MEMBER Piece next() {
      if (last <= span.begin) return {last, last, last, 0};
      const index_t every = f.given.every;
      if (Plan::saved_in_chunks && last == start) {
        left = pieces(f.saved_chunk, every);
        start -= f.saved_chunk, copies -= left;
      }
      left--;
      const index_t kept = clamp(start + left * every, span.first, last), end = last;
      last = Plan::parallel ? clamp(kept, span.begin, last) : kept;
      return {kept, last, end, copies + left};
    }
  };

  // Piece by piece: recomputes the states from the one that was kept, then goes back over the piece.
  template <int depth, int replay_depth, bool reverse, class Work>
  SRU_FN void backward_from_pieces(const BackwardArguments<Cell> &f, const Part &at, const Span<reverse> &span,
                                   const Fixed &fixed, Work &work) {
    const Given &a = f.given;
    const index_t rows = batch(a) * Plan::D * Plan::d, offset = at.row(reverse) * Plan::d + at.j;
    const Scratch scratch(f, at, reverse, span.chunk);
    Pieces<reverse> all(f, span);
    for (Piece piece = all.next(); piece.steps(); piece = all.next()) {
      Pack<Saved> state[Cell::n_state];
      piece.read(f, offset, state);
      Replay replay = {fixed, scratch};
      for (int i = 0; i < Cell::n_state; i++) replay.state[i] = widen(state[i]);
      if constexpr (Plan::parallel) pass<replay_depth>(a, at, span, fixed, piece.kept, piece.first, replay.state);
      Reader<reverse, !reverse> forwards(a, at, span.time(piece.first));
      sweep<replay_depth>(forwards, piece.steps(), replay);

      const index_t t = span.time(piece.last - 1);
      BackReader<reverse, acc> from = {{a, at, t}, (const Io *)f.dh + t * rows + offset};
      for (int i = 0; i < Cell::n_state; i++) from.state[i] = scratch.value[i] + (piece.steps() - 1) * scratch.step;
      from.dh_step = reverse ? rows : -rows;
      from.state_step = scratch.step;
      work.start(f, at, t);
      sweep<depth>(from, piece.steps(), work);
    }
  }

  // Takes the adjoint of the state back over a span, and writes all that is wanted of it; as forward_span().
  template <Which which = all, bool reverse, class Around = Plainly>
  SRU_FN void backward_span(const BackwardArguments<Cell> &f, const Part &at, const Span<reverse> &span, real *dstate,
                            Around around = {}) {
    const Fixed fixed(f.given, at, reverse);
    Backward<reverse> work(f, at, span, fixed, dstate);
    if constexpr (Plan::keep == 1) {
      auto &&taker = around(work);
      backward_from_saved<Plan::depth, which>(f, at, span, taker);
    } else {
      backward_from_pieces<Plan::depth, Plan::replay_depth>(f, at, span, fixed, work);
    }
    work.finish(f, at, span);
    work.pad(f, at, span);
    for (int i = 0; i < Cell::n_state; i++) dstate[i] = work.dstate[i];
  }

  template <bool reverse>
  SRU_FN void backward_direction(const BackwardArguments<Cell> &f) {
    const Part at(f.given);
    if (at.idle) return;
    const Span<reverse> span(f.given, at, blockIdx.z);
    real dstate[Cell::n_state];
    end_adjoint(f, at, span, dstate);
    backward_span(f, at, span, dstate);
  }

  SRU_FN void backward(const BackwardArguments<Cell> &f) {
    if (Plan::D == 1 || blockIdx.y == 0)
      backward_direction<false>(f);
    else
      backward_direction<true>(f);
  }

  // ----------------------------------------------------------------------------------------------------------------
  // Sums of partial sums, in an order that depends on nothing but their number: each of the block's `groups` rows of
  // threads takes every groups-th, then their sums are added in turn. A block serves 32 channels.

  static constexpr int groups = 8;

  template <class To>
  SRU_FN void sum_up(const acc *from, index_t n, index_t distance, To *to) {  // null `to`: not wanted
    __shared__ acc sums[groups][32];
    acc sum = 0;
    for (index_t i = threadIdx.y; to && i < n; i += groups) sum += from[i * distance];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0 || !to) return;
    for (int i = 1; i < groups; i++) sum += sums[i][threadIdx.x];
    store(to, narrow<To>(Vec<acc, 1>(sum)));
  }

  // Gradients of parameter blockIdx.y of direction blockIdx.z: over all sequences (and chunks of time).
  SRU_FN void sum_partials(const BackwardArguments<Cell> &f) {
    const Slot &slot = f.dparam[blockIdx.y];
    const index_t j = index_t(blockIdx.x) * 32 + threadIdx.x, step = n_sums * f.partial.stride;
    const index_t n = batch(f.given) * (Plan::parallel ? chunks(f.given) : 1), offset = blockIdx.z * slot.stride + j;
    const acc *const from = (const acc *)f.partial.data + blockIdx.z * step + blockIdx.y * f.partial.stride + j;
    const bool wanted = slot.data && j < Plan::d;
    if (Plan::narrow && is_narrow(blockIdx.y))
      sum_up(from, n, Plan::D * step, wanted ? (Io *)slot.data + offset : nullptr);
    else
      sum_up(from, n, Plan::D * step, wanted ? (acc *)slot.data + offset : nullptr);
  }
};

// The entry points of one compiled kernel. `bytes` is what the caller takes for the size of the struct.
#define SRU_GPU_FORWARD(Cell, Io, Saved, wide, Plan, bytes)                                              \
  static_assert(sizeof(ForwardArguments<Cell>) == bytes, "cuda/arguments.h and sru_rt/abi.py disagree"); \
  extern "C" __global__ void __launch_bounds__(Plan::threads, 1)                                         \
      forward(const __grid_constant__ ForwardArguments<Cell> f) {                                        \
    GpuSweep<Cell, Io, Saved, wide, Plan>::forward(f);                                                   \
  }
#define SRU_GPU_BACKWARD(Cell, Io, Saved, wide, Plan, bytes)                                              \
  static_assert(sizeof(BackwardArguments<Cell>) == bytes, "cuda/arguments.h and sru_rt/abi.py disagree"); \
  extern "C" __global__ void __launch_bounds__(Plan::threads, 1)                                          \
      backward(const __grid_constant__ BackwardArguments<Cell> f) {                                       \
    GpuSweep<Cell, Io, Saved, wide, Plan>::backward(f);                                                   \
  }                                                                                                       \
  SRU_GPU_SUMS(Cell, Io, Saved, wide, Plan)
#define SRU_GPU_SUMS(Cell, Io, Saved, wide, Plan)                                                                     \
  extern "C" __global__ void __launch_bounds__(256) sum_partials(const __grid_constant__ BackwardArguments<Cell> f) { \
    GpuSweep<Cell, Io, Saved, wide, Plan>::sum_partials(f);                                                           \
  }
