// Sweeps over time on the CPU, for any cell: time outermost, then the rows of one step, then channels in packs.
// Rows of one step are neighbours in memory, so each step reads and writes whole contiguous stretches.
#pragma once

#include "arguments.h"

// Results of so many bytes and more are written past the caches where one store fills a line. Where it takes two,
// others come in between: that made a large backward two to three times as slow.
#ifndef SRU_STREAMING_BYTES
#if SRU_VECTOR_BYTES == 64
#define SRU_STREAMING_BYTES ((index_t)8 << 20)
#else
#define SRU_STREAMING_BYTES ((index_t)1 << 62)
#endif
#endif

// A sweep that moves so many bytes asks for memory before it comes to it, so that in all its arrays `lead_bytes` are
// ahead of the channel at hand. Both are measured: for fewer bytes the hardware does that as well, what is asked for
// later comes late, and what is asked for earlier drives from the first-level cache what is used again.
#ifndef SRU_FAR_BYTES
#define SRU_FAR_BYTES ((index_t)16 << 20)
#endif
constexpr index_t lead_bytes = 12 << 10, near_lead = 512;  // the latter in channels, of sweeps that move less

// Runs task(argument, i) for every i in [0, n), on several threads.
typedef void (*ParallelFor)(void (*task)(void *, int), void *argument, int n);

// `Io` is the type of x, u and h; `Saved` that of the states kept for the backward; bit i of `wide` says that input i
// is stored in the type of the state.
template <class Cell, class Io, class Saved, unsigned wide>
struct CpuSweep {
  typedef typename Storage<Io>::acc acc;
  typedef Vec<acc, SRU_VECTOR_BYTES / sizeof(acc)> real;
  typedef RecurrenceArguments<Cell> Given;
  // Of a step and channel: of gates and inputs alone, and all that a sweep moves.
  static constexpr index_t read_bytes = sizeof(Io) * (Cell::n_gates + Cell::n_inputs),
                           forward_bytes = read_bytes + sizeof(Io),
                           backward_bytes = 2 * read_bytes + sizeof(Io) + Cell::n_state * sizeof(Saved);
  static_assert(Cell::n_inputs <= 32, "`wide` has one bit for each input");

  // The part of the work that one task does: sequences and directions [first, last), channels [from, to).
  struct Part {
    index_t first, last, from, to;
  };

  // One (step, sequence, direction): which rows it reads, and what happens to the state there.
  struct Place {
    index_t row, sequence, direction, state;  // `state` is the row in (D, B, d)
    bool padded, starts_anew;

    SRU_MEMBER Place(const Given &a, index_t s, index_t n) {
      const index_t b = n >> (a.D - 1), q = n & (a.D - 1), t = q ? a.L - 1 - s : s;
      const index_t length = a.lengths ? clamp(a.lengths[b], 0, a.L) : a.L;
      // A boundary stands before step t; the reverse direction crosses it on its way from t to t - 1.
      const index_t boundary = q ? t + 1 : t;
      row = row_of(a, s, n);
      sequence = n;
      direction = q;
      state = state_row(a, n);
      padded = t >= length || (a.mask && a.mask[t * a.B + b]);
      starts_anew = a.reset && boundary < length && t < length && a.reset[boundary * a.B + b];
    }
  };

  // The rows of a part in the order of a sweep: those of one step, then those of the next one.
  struct Walk {
    struct Row {
      index_t s, n;
    };
    const Part &part;
    index_t end, by, lead;
    Row now, later;  // `later` is the row that `lead` leads to, in whole rows, of which it is one at least

    // Steps [begin, end), upwards or downwards, of a sweep that moves so many bytes of a step and channel.
    SRU_MEMBER Walk(const Part &part, index_t begin, index_t end, bool upwards, index_t bytes)
        : part(part), end(upwards ? end : begin - 1), by(upwards ? 1 : -1), lead(lead_bytes / bytes) {
      now.s = upwards ? begin : end - 1, now.n = part.first;
      if (part.first == part.last) now.s = this->end;
      later = now;
      const index_t channels = part.to - part.from;
      move(later);
      for (index_t gone = channels; channels && gone + channels <= lead; gone += channels) move(later);
    }
    SRU_MEMBER void move(Row &row) const {
      if (row.s == end || ++row.n < part.last) return;
      row.n = part.first;
      row.s += by;
    }
    SRU_MEMBER bool goes_on() const { return now.s != end; }
    SRU_MEMBER void next() { move(now), move(later); }
  };

  // How a sweep deals with memory: not at all, or it asks for what it comes to later, to read and to write it or to
  // read it alone, as what it writes goes past the caches.
  enum Access { cached, asked_for, streaming };

  // Of so many bytes of a step and channel, which are moved and written.
  SRU_FN Access access(const Given &a, index_t moved, index_t written, bool aligned) {
    const index_t channels = a.L * a.B * a.D * a.d;
    const bool fills_lines = sizeof(Io) == sizeof(acc) && a.d % real::width == 0;
    if (aligned && fills_lines && channels * written >= SRU_STREAMING_BYTES) return streaming;
    return channels * moved >= SRU_FAR_BYTES ? asked_for : cached;
  }
  SRU_FN bool is_aligned(const void *p) { return (uintptr_t)p % SRU_VECTOR_BYTES == 0; }

  // How many channels from what is at hand that lies, in gates and their gradients, in states that are kept, and in all
  // else. It serves speed alone, so that one number may do for all gates, which usually are rows of one array.
  struct Ahead {
    index_t gates, kept, others, lead;
    Access access;

    SRU_MEMBER Ahead moved(index_t channels) const {
      return {gates + channels, kept + channels, others + channels, lead, access};
    }
    SRU_MEMBER Ahead within_row(index_t channels) const { return {channels, channels, channels, lead, access}; }
  };

  SRU_FN Ahead near() { return {near_lead, near_lead, near_lead, near_lead, cached}; }
  SRU_FN Ahead ahead(const Given &a, const Walk &walk, Access access) {
    const typename Walk::Row &now = walk.now, &later = walk.later;
    if (later.s == walk.end) return {0, 0, 0, walk.lead, access};  // there are no more
    const index_t rows = row_of(a, later.s, later.n) - row_of(a, now.s, now.n);
    const index_t kept_rows = (later.s - now.s) * a.B * a.D + later.n - now.n;
    return {rows * (Cell::n_gates ? a.gate[0].stride : 0), kept_rows * a.d, rows * a.d, walk.lead, access};
  }
  SRU_FN index_t row_of(const Given &a, index_t s, index_t n) {
    const index_t b = n >> (a.D - 1), q = n & (a.D - 1);  // D is 1 or 2
    return ((q ? a.L - 1 - s : s) * a.B + b) * a.D + q;
  }

  SRU_FN index_t clamp(index_t i, index_t low, index_t high) { return i < low ? low : i > high ? high : i; }

  // ----------------------------------------------------------------------------------------------------------------
  // Rows

  template <bool whole, class T>
  SRU_FN real get(const T *p, int n) {
    return whole ? load<real>(p) : load_part<real>(p, n);
  }
  // At channel j of a row, for what comes from memory rather than from a cache, and what goes there; k is where it is
  // asked for what comes later.
  template <bool whole, class T>
  SRU_FN real get_ahead(const T *row, index_t j, int n, index_t k) {
    prefetch(row, k);
    return get<whole>(row + j, n);
  }
  template <bool whole, class T>
  SRU_FN void put_ahead(T *row, index_t j, real a, int n, index_t k, Access access) {
    if (access == asked_for) prefetch_to_write(row, k);
    put<whole>(row + j, a, n, access == streaming);
  }
  template <bool whole, class T>
  SRU_FN void put(T *p, real a, int n, bool past_caches = false) {
    if (!whole)
      store_part(p, a, n);
    else if (past_caches)
      store_streaming(p, a);
    else
      store(p, a);
  }

  // Calls body(j, n, whole) for each pack of channels; the last one may be part of a pack.
  template <class Body>
  SRU_FN void for_channels(const Part &part, Body body) {
    index_t j = part.from;
    for (; j + real::width <= part.to; j += real::width) body.template operator()<true>(j, real::width);
    if (j < part.to) body.template operator()<false>(j, int(part.to - j));
  }

  template <bool is_far>
  struct Distance {
    static constexpr bool far = is_far;
  };
  // The same with body(distance, ahead). Bodies for what is near are compiled apart, as distances that are known make
  // them faster. For what is far, the channels at the end of a row are ahead of those in the row `later`, and the
  // others of those in their own.
  template <class Bodies>
  SRU_FN void for_channels_ahead(const Part &part, const Ahead &later, Bodies body) {
    if (later.access == cached) {
      for_channels(part, body(Distance<false>(), later));
      return;
    }
    const index_t channels = part.to - part.from,
                  cut = channels > later.lead ? (channels - later.lead) / real::width * real::width : 0;
    for (int i = cut ? 0 : 1; i < 2; i++) {
      Part some = part;
      (i ? some.from : some.to) = part.from + cut;
      for_channels(some, body(Distance<true>(), i ? later.moved(-cut) : later.within_row(channels - cut)));
    }
  }

  template <class To, class From>
  struct CopyRow {
    To *to;
    const From *from;  // null: zeros
    template <bool whole>
    SRU_MEMBER void operator()(index_t j, int n) const {
      put<whole>(to + j, from ? get<whole>(from + j, n) : real(0), n);
    }
  };
  template <class To, class From>
  SRU_FN void copy_row(const Part &part, To *to, const From *from) {
    for_channels(part, CopyRow<To, From>{to, from});
  }

  // What step() and gradient() are given at one place, as pointers to rows.
  struct Reader {
    const Io *gate[SRU_AT_LEAST_ONE(Cell::n_gates)];
    const void *input[SRU_AT_LEAST_ONE(Cell::n_inputs)];
    const acc *per_sequence[SRU_AT_LEAST_ONE(Cell::n_per_sequence)], *param[SRU_AT_LEAST_ONE(Cell::n_params)];
    real constant[SRU_AT_LEAST_ONE(Cell::n_constants)];

    SRU_MEMBER Reader(const Given &a, const Place &at) {
      for (int i = 0; i < Cell::n_gates; i++) gate[i] = (const Io *)a.gate[i].data + at.row * a.gate[i].stride;
      for (int i = 0; i < Cell::n_inputs; i++)
        input[i] = is_wide(i) ? (const void *)((const acc *)a.input[i].data + at.row * a.input[i].stride)
                              : (const void *)((const Io *)a.input[i].data + at.row * a.input[i].stride);
      for (int i = 0; i < Cell::n_per_sequence; i++)
        per_sequence[i] = (const acc *)a.per_sequence[i].data + at.sequence * a.per_sequence[i].stride;
      for (int i = 0; i < Cell::n_params; i++)
        param[i] = (const acc *)a.param[i].data + at.direction * a.param[i].stride;
      for (int i = 0; i < Cell::n_constants; i++) constant[i] = real(a.constant[i]);
    }
  };
  SRU_FN bool is_wide(int i) { return (wide >> i) & 1; }

  // The same at one pack of channels, as numbers.
  template <bool whole>
  struct Values {
    real gate[SRU_AT_LEAST_ONE(Cell::n_gates)], input[SRU_AT_LEAST_ONE(Cell::n_inputs)];
    real per_sequence[SRU_AT_LEAST_ONE(Cell::n_per_sequence)], param[SRU_AT_LEAST_ONE(Cell::n_params)];

    SRU_MEMBER Values(const Reader &from, const Ahead &ahead, index_t j, int n) {
      for (int i = 0; i < Cell::n_gates; i++) gate[i] = get_ahead<whole>(from.gate[i], j, n, j + ahead.gates);
      for (int i = 0; i < Cell::n_inputs; i++)
        input[i] = is_wide(i) ? get_ahead<whole>((const acc *)from.input[i], j, n, j + ahead.others)
                              : get_ahead<whole>((const Io *)from.input[i], j, n, j + ahead.others);
      for (int i = 0; i < Cell::n_per_sequence; i++) per_sequence[i] = get<whole>(from.per_sequence[i] + j, n);
      for (int i = 0; i < Cell::n_params; i++) param[i] = get<whole>(from.param[i] + j, n);
    }
  };

  // ----------------------------------------------------------------------------------------------------------------
  // Forward

  template <bool is_far>
  struct StepRow {
    const Reader &from;
    Ahead far;
    const acc *const *prev;  // null rows: zeros
    acc *const *next;
    Saved *const *kept;  // a copy of the new states; null rows: not wanted
    Io *h;               // null: not wanted

    template <bool whole>
    SRU_MEMBER void operator()(index_t j, int n) const {
      const Ahead ahead = is_far ? far : near();
      const Values<whole> in(from, ahead, j, n);
      real state[Cell::n_state], new_state[Cell::n_state], new_h;
      for (int i = 0; i < Cell::n_state; i++) state[i] = prev[i] ? get<whole>(prev[i] + j, n) : real(0);
      Cell::template step<real>(in.gate, in.input, in.per_sequence, in.param, state, from.constant, new_state, &new_h);
      for (int i = 0; i < Cell::n_state; i++) {
        put<whole>(next[i] + j, new_state[i], n);
        if (kept[i]) put_ahead<whole>(kept[i], j, new_state[i], n, j + ahead.kept, ahead.access);
      }
      if (h) put_ahead<whole>(h, j, new_h, n, j + ahead.others, ahead.access);
    }
  };

  // One step of one row: from the states `prev` to the states `next`, which may be the same rows.
  SRU_FN void step_row(const Given &a, const Place &at, const Part &part, const acc *const *prev, acc *const *next,
                       Saved *const *kept, Io *h, const Ahead &later) {
    const acc *start[Cell::n_state];
    for (int i = 0; i < Cell::n_state; i++) start[i] = at.starts_anew ? nullptr : prev[i];
    if (!at.padded) {
      const Reader from(a, at);
      for_channels_ahead(part, later, [&](auto distance, const Ahead &ahead) {
        return StepRow<distance.far>{from, ahead, start, next, kept, h};
      });
      return;
    }
    for (int i = 0; i < Cell::n_state; i++) {
      if (start[i] != next[i]) copy_row(part, next[i], start[i]);
      if (kept[i]) copy_row(part, kept[i], start[i]);
    }
    if (h) copy_row(part, h, (const Io *)nullptr);
  }

  // The state is carried in c_last; what is kept for the backward is a copy.
  static void forward(const ForwardArguments<Cell> &f, const Part &part) {
    const Given &a = f.given;
    const index_t rows = a.B * a.D;
    bool aligned = is_aligned(f.h);
    for (int i = 0; i < Cell::n_state; i++) aligned = aligned && is_aligned(f.saved[i]);
    const index_t written = sizeof(Io) + (a.every == 1) * Cell::n_state * sizeof(Saved);
    const Access how = access(a, read_bytes + written, written, aligned);
    for (index_t n = part.first; n < part.last; n++)
      for (int i = 0; i < Cell::n_state; i++) {
        const acc *c0 = a.c0[i] ? (const acc *)a.c0[i] + state_row(a, n) * a.d : nullptr;
        acc *c = (acc *)f.c_last[i] + state_row(a, n) * a.d;
        if (c != c0) copy_row(part, c, c0);
        if (a.every && a.L) copy_row(part, (Saved *)f.saved[i] + n * a.d, (const acc *)c);
      }
    for (Walk walk(part, 0, a.L, true, forward_bytes); walk.goes_on(); walk.next()) {
      const index_t s = walk.now.s, n = walk.now.n;
      const bool keep = a.every && s + 1 < a.L && (s + 1) % a.every == 0;
      const Place at(a, s, n);
      acc *c[Cell::n_state];
      Saved *kept[Cell::n_state];
      for (int i = 0; i < Cell::n_state; i++) {
        c[i] = (acc *)f.c_last[i] + at.state * a.d;
        kept[i] = keep ? (Saved *)f.saved[i] + ((s + 1) / a.every * rows + n) * a.d : nullptr;
      }
      step_row(a, at, part, c, c, kept, (Io *)f.h + at.row * a.d, ahead(a, walk, how));
    }
    if (how == streaming) finish_streaming();
  }

  SRU_FN index_t state_row(const Given &a, index_t n) { return (n & (a.D - 1)) * a.B + (n >> (a.D - 1)); }

  // ----------------------------------------------------------------------------------------------------------------
  // Backward

  // Where the gradients of one place go; null rows are not wanted.
  struct Writer {
    Io *gate[SRU_AT_LEAST_ONE(Cell::n_gates)];
    void *input[SRU_AT_LEAST_ONE(Cell::n_inputs)];
    acc *per_sequence[SRU_AT_LEAST_ONE(Cell::n_per_sequence)], *param[SRU_AT_LEAST_ONE(Cell::n_params)];

    SRU_MEMBER Writer(const BackwardArguments<Cell> &f, const Place &at) {
      for (int i = 0; i < Cell::n_gates; i++)
        gate[i] = f.dgate[i].data ? (Io *)f.dgate[i].data + at.row * f.dgate[i].stride : nullptr;
      for (int i = 0; i < Cell::n_inputs; i++) {
        const index_t offset = at.row * f.dinput[i].stride;
        input[i] = !f.dinput[i].data ? nullptr
                   : is_wide(i)      ? (void *)((acc *)f.dinput[i].data + offset)
                                     : (void *)((Io *)f.dinput[i].data + offset);
      }
      for (int i = 0; i < Cell::n_per_sequence; i++) {
        const Slot &to = f.dper_sequence[i];
        per_sequence[i] = to.data ? (acc *)to.data + at.sequence * to.stride : nullptr;
      }
      for (int i = 0; i < Cell::n_params; i++) param[i] = f.dparam[i].data ? partial_row(f, at.sequence, i) : nullptr;
    }
  };
  SRU_FN acc *partial_row(const BackwardArguments<Cell> &f, index_t sequence, int i) {
    return (acc *)f.partial.data + (sequence * Cell::n_params + i) * f.partial.stride;
  }

  template <class State, bool is_far>
  struct GradientRow {
    const Reader &from;
    Ahead far;
    const Writer &to;
    const State *const *prev;  // null rows: zeros
    const Io *dh;
    acc *const *dstate;
    bool starts_anew;

    template <bool whole>
    SRU_MEMBER void operator()(index_t j, int n) const {
      const Ahead ahead = is_far ? far : near();
      const Values<whole> in(from, ahead, j, n);
      real state[Cell::n_state], dnew_state[Cell::n_state], dold_state[Cell::n_state];
      real dgate[SRU_AT_LEAST_ONE(Cell::n_gates)], dinput[SRU_AT_LEAST_ONE(Cell::n_inputs)];
      real dper_sequence[SRU_AT_LEAST_ONE(Cell::n_per_sequence)], dparam[SRU_AT_LEAST_ONE(Cell::n_params)];
      for (int i = 0; i < Cell::n_state; i++) {
        state[i] = prev[i] ? get_ahead<whole>(prev[i], j, n, j + ahead.kept) : real(0);
        dnew_state[i] = get<whole>(dstate[i] + j, n);
      }
      const real dnew_h = get_ahead<whole>(dh, j, n, j + ahead.others);
      Cell::template gradient<real>(in.gate, in.input, in.per_sequence, in.param, state, from.constant, dnew_state,
                                    &dnew_h, dgate, dinput, dper_sequence, dparam, dold_state);
      for (int i = 0; i < Cell::n_gates; i++)
        if (to.gate[i]) put_ahead<whole>(to.gate[i], j, dgate[i], n, j + ahead.gates, ahead.access);
      for (int i = 0; i < Cell::n_inputs; i++)
        if (to.input[i]) {
          if (is_wide(i))
            put_ahead<whole>((acc *)to.input[i], j, dinput[i], n, j + ahead.others, ahead.access);
          else
            put_ahead<whole>((Io *)to.input[i], j, dinput[i], n, j + ahead.others, ahead.access);
        }
      for (int i = 0; i < Cell::n_per_sequence; i++)
        if (to.per_sequence[i]) add<whole>(to.per_sequence[i] + j, dper_sequence[i], n);
      for (int i = 0; i < Cell::n_params; i++)
        if (to.param[i]) add<whole>(to.param[i] + j, dparam[i], n);
      for (int i = 0; i < Cell::n_state; i++) put<whole>(dstate[i] + j, starts_anew ? real(0) : dold_state[i], n);
    }
  };
  template <bool whole>
  SRU_FN void add(acc *p, real a, int n) {
    put<whole>(p, get<whole>(p, n) + a, n);
  }

  // Nothing flows into a padded step but the adjoint of the state, which passes through.
  SRU_FN void padded_row(const Part &part, const Writer &to, const Place &at, acc *const *dstate) {
    for (int i = 0; i < Cell::n_gates; i++)
      if (to.gate[i]) copy_row(part, to.gate[i], (const Io *)nullptr);
    for (int i = 0; i < Cell::n_inputs; i++)
      if (to.input[i]) {
        if (is_wide(i))
          copy_row(part, (acc *)to.input[i], (const acc *)nullptr);
        else
          copy_row(part, (Io *)to.input[i], (const Io *)nullptr);
      }
    for (int i = 0; i < Cell::n_state; i++)
      if (at.starts_anew) copy_row(part, dstate[i], (const acc *)nullptr);
  }

  // `kept` holds the states before each step, `kept_row` is the row of this one.
  template <class State>
  SRU_FN void gradient_row(const BackwardArguments<Cell> &f, index_t s, index_t n, index_t kept_row,
                           const void *const *kept, const Part &part, const Ahead &later) {
    const Given &a = f.given;
    const Place at(a, s, n);
    const Writer to(f, at);
    acc *dstate[Cell::n_state];
    for (int i = 0; i < Cell::n_state; i++) dstate[i] = (acc *)f.dc0[i] + at.state * a.d;
    if (at.padded) {
      padded_row(part, to, at, dstate);
      return;
    }
    const State *prev[Cell::n_state];
    for (int i = 0; i < Cell::n_state; i++)
      prev[i] = at.starts_anew ? nullptr : (const State *)kept[i] + kept_row * a.d;
    const Reader from(a, at);
    const Io *dh = (const Io *)f.dh + at.row * a.d;
    for_channels_ahead(part, later, [&](auto distance, const Ahead &ahead) {
      return GradientRow<State, distance.far>{from, ahead, to, prev, dh, dstate, at.starts_anew};
    });
  }

  // Recomputes the states before steps begin .. end - 1 into the scratch, from the one that was kept.
  SRU_FN void recompute(const BackwardArguments<Cell> &f, index_t begin, index_t end, const Part &part, Access access) {
    const Given &a = f.given;
    const index_t rows = a.B * a.D;
    Saved *const no_copy[Cell::n_state] = {};
    for (Walk walk(part, begin, end, true, forward_bytes); walk.goes_on(); walk.next()) {
      const index_t s = walk.now.s, n = walk.now.n;
      acc *prev[Cell::n_state], *next[Cell::n_state];
      for (int i = 0; i < Cell::n_state; i++) {
        prev[i] = (acc *)f.states[i] + ((s - begin) * rows + n) * a.d;
        next[i] = prev[i] + rows * a.d;
        if (s == begin) copy_row(part, prev[i], (const Saved *)f.saved[i] + (begin / a.every * rows + n) * a.d);
      }
      if (s + 1 < end) step_row(a, Place(a, s, n), part, prev, next, no_copy, nullptr, ahead(a, walk, access));
    }
  }

  static void backward(const BackwardArguments<Cell> &f, const Part &part) {
    const Given &a = f.given;
    const index_t rows = a.B * a.D;
    const Access how = access(f);
    for (index_t n = part.first; n < part.last; n++) start_row(f, n, part);
    for (index_t end = a.L; end > 0;) {
      const index_t begin = (end - 1) / a.every * a.every;
      if (a.every > 1) recompute(f, begin, end, part, how);
      for (Walk walk(part, begin, end, false, backward_bytes); walk.goes_on(); walk.next()) {
        const index_t s = walk.now.s, n = walk.now.n;
        if (a.every > 1)
          gradient_row<acc>(f, s, n, (s - begin) * rows + n, f.states, part, ahead(a, walk, how));
        else
          gradient_row<Saved>(f, s, n, s * rows + n, f.saved, part, ahead(a, walk, how));
      }
      end = begin;
    }
    if (how == streaming) finish_streaming();
  }

  // The adjoint of the last state, and zeros where sums begin.
  SRU_FN void start_row(const BackwardArguments<Cell> &f, index_t n, const Part &part) {
    const Given &a = f.given;
    const index_t place = state_row(a, n) * a.d;
    for (int i = 0; i < Cell::n_state; i++)
      copy_row(part, (acc *)f.dc0[i] + place, f.dc_last[i] ? (const acc *)f.dc_last[i] + place : nullptr);
    for (int i = 0; i < Cell::n_per_sequence; i++)
      if (f.dper_sequence[i].data)
        copy_row(part, (acc *)f.dper_sequence[i].data + n * f.dper_sequence[i].stride, (const acc *)nullptr);
    for (int i = 0; i < Cell::n_params; i++)
      if (f.dparam[i].data) copy_row(part, partial_row(f, n, i), (const acc *)nullptr);
  }

  SRU_FN Access access(const BackwardArguments<Cell> &f) {
    bool aligned = true;
    for (int i = 0; i < Cell::n_gates; i++) aligned = aligned && is_aligned(f.dgate[i].data);
    for (int i = 0; i < Cell::n_inputs; i++) aligned = aligned && is_aligned(f.dinput[i].data);
    return access(f.given, backward_bytes, read_bytes, aligned);
  }

  // Sums the parameters' gradients over sequences, in ascending order, so that they do not depend on the tasks.
  static void sum_partials(const BackwardArguments<Cell> &f) {
    const Given &a = f.given;
    for (index_t q = 0; q < a.D; q++)
      for (int i = 0; i < Cell::n_params; i++) {
        if (!f.dparam[i].data) continue;
        acc *sum = (acc *)f.dparam[i].data + q * f.dparam[i].stride;
        for (index_t j = 0; j < a.d; j++) sum[j] = 0;
        for (index_t b = 0; b < a.B; b++) {
          const acc *part = partial_row(f, b * a.D + q, i);
          for (index_t j = 0; j < a.d; j++) sum[j] += part[j];
        }
      }
  }

  // ----------------------------------------------------------------------------------------------------------------
  // Tasks. The results do not depend on how the work is cut.

  template <class A, class B>
  struct Same {
    static constexpr bool value = false;
  };
  template <class A>
  struct Same<A, A> {
    static constexpr bool value = true;
  };
  template <class A, class B>
  static constexpr bool same = Same<A, B>::value;

  template <class Arguments>
  struct Job {
    const Arguments &f;
    void (*sweep)(const Arguments &, const Part &);
    int tasks;

    static void run(void *self, int i) {
      const Job &job = *(const Job *)self;
      const index_t rows = job.f.given.B * job.f.given.D, d = job.f.given.d;
      // By sequences where there are enough of them, else by channels in whole packs.
      const bool by_rows = rows >= job.tasks;
      const index_t packs = (d + real::width - 1) / real::width;
      const Part part = {by_rows ? rows * i / job.tasks : 0, by_rows ? rows * (i + 1) / job.tasks : rows,
                         by_rows ? 0 : packs * i / job.tasks * real::width,
                         by_rows ? d : clamp(packs * (i + 1) / job.tasks * real::width, 0, d)};
      job.sweep(job.f, part);
    }
  };

  template <class Arguments>
  static void run(const Arguments &f, void (*sweep)(const Arguments &, const Part &), ParallelFor parallel_for,
                  int tasks) {
    Job<Arguments> job = {f, sweep, tasks};
    if (parallel_for && tasks > 1) {
      parallel_for(Job<Arguments>::run, &job, tasks);
    } else {
      job.tasks = 1;
      Job<Arguments>::run(&job, 0);
    }
  }
};

// The entry points of one compiled kernel.
#define SRU_CPU_KERNEL(Cell, Io, Saved, wide)                                                       \
  typedef CpuSweep<Cell, Io, Saved, wide> Sweep;                                                    \
  SRU_EXPORT void forward(const ForwardArguments<Cell> *f, ParallelFor parallel_for, int tasks) {   \
    Sweep::run(*f, Sweep::forward, parallel_for, tasks);                                            \
  }                                                                                                 \
  SRU_EXPORT void backward(const BackwardArguments<Cell> *f, ParallelFor parallel_for, int tasks) { \
    Sweep::run(*f, Sweep::backward, parallel_for, tasks);                                           \
    Sweep::sum_partials(*f);                                                                        \
  }                                                                                                 \
  SRU_EXPORT index_t forward_size() { return sizeof(ForwardArguments<Cell>); }                      \
  SRU_EXPORT index_t backward_size() { return sizeof(BackwardArguments<Cell>); }
