// The plainest kernels for any cell, to compare with: one thread for each channel, which reads a step when it comes to
// it, with all sizes known at run time. The step and its mathematics are those of gpu_sweep.h, and so are the
// arguments. No padding and no resets; the backward reads states that were kept before every step, and leaves the
// gradients of parameters as sums for each sequence.
//
// Before this file stand cuda/arguments.h, the text of a cell, and typedefs `naive_cell`, `io` and `saved_io`.

typedef Storage<io>::acc acc;
typedef Vec<acc, 1> real;
typedef RecurrenceArguments<naive_cell> Given;

// One channel of one sequence and direction, and its place in a row of each kind.
struct Place {
  index_t n, row, j, b, q;

  SRU_MEMBER explicit Place(const Given &a) {
    n = index_t(blockIdx.x) * blockDim.x + threadIdx.x;
    row = n / a.d, j = n - row * a.d;
    b = row / a.D, q = row - b * a.D;
  }
  SRU_MEMBER bool exists(const Given &a) const { return n < a.B * a.D * a.d; }
  SRU_MEMBER index_t state(const Given &a) const { return (q * a.B + b) * a.d + j; }
  // Step i of the direction.
  SRU_MEMBER index_t step(const Given &a, index_t i) const { return (q ? a.L - 1 - i : i) * a.B * a.D + row; }
};

template <class T>
SRU_FN auto read(const void *array, index_t i) {
  return widen(load_packed<T, 1>((const T *)array + i));
}
template <class T>
SRU_FN void write(void *array, index_t i, real x) {
  store((T *)array + i, narrow<T>(x));
}

struct Values {
  real gate[SRU_AT_LEAST_ONE(naive_cell::n_gates)], input[SRU_AT_LEAST_ONE(naive_cell::n_inputs)];

  SRU_MEMBER Values(const Given &a, index_t row, index_t j) {
    for (int i = 0; i < naive_cell::n_gates; i++) gate[i] = read<io>(a.gate[i].data, row * a.gate[i].stride + j);
    for (int i = 0; i < naive_cell::n_inputs; i++) input[i] = read<io>(a.input[i].data, row * a.input[i].stride + j);
  }
};

struct Fixed {
  real per_sequence[SRU_AT_LEAST_ONE(naive_cell::n_per_sequence)], param[SRU_AT_LEAST_ONE(naive_cell::n_params)];
  real constant[SRU_AT_LEAST_ONE(naive_cell::n_constants)];

  SRU_MEMBER Fixed(const Given &a, const Place &at) {
    for (int i = 0; i < naive_cell::n_per_sequence; i++)
      per_sequence[i] = read<acc>(a.per_sequence[i].data, at.row * a.per_sequence[i].stride + at.j);
    for (int i = 0; i < naive_cell::n_params; i++)
      param[i] = read<acc>(a.param[i].data, at.q * a.param[i].stride + at.j);
    for (int i = 0; i < naive_cell::n_constants; i++) constant[i] = real(a.constant[i]);
  }
};

extern "C" __global__ void forward(const __grid_constant__ ForwardArguments<naive_cell> f) {
  const Given &a = f.given;
  const Place at(a);
  if (!at.exists(a)) return;
  const Fixed fixed(a, at);
  real state[naive_cell::n_state], new_state[naive_cell::n_state], h;
  for (int i = 0; i < naive_cell::n_state; i++) state[i] = a.c0[i] ? read<acc>(a.c0[i], at.state(a)) : real(0);
#pragma unroll 1
  for (index_t t = 0; t < a.L; t++) {
    const index_t row = at.step(a, t);
    if (a.every && t % a.every == 0)
      for (int i = 0; i < naive_cell::n_state; i++)
        write<saved_io>(f.saved[i], (t / a.every * a.B * a.D + at.row) * a.d + at.j, state[i]);
    const Values in(a, row, at.j);
    naive_cell::step<real>(in.gate, in.input, fixed.per_sequence, fixed.param, state, fixed.constant, new_state, &h);
    for (int i = 0; i < naive_cell::n_state; i++) state[i] = new_state[i];
    write<io>(f.h, row * a.d + at.j, h);
  }
  for (int i = 0; i < naive_cell::n_state; i++) write<acc>(f.c_last[i], at.state(a), state[i]);
}

extern "C" __global__ void backward(const __grid_constant__ BackwardArguments<naive_cell> f) {
  const Given &a = f.given;
  const Place at(a);
  if (!at.exists(a)) return;
  const Fixed fixed(a, at);
  real dstate[naive_cell::n_state], state[naive_cell::n_state], dold_state[naive_cell::n_state];
  real dparam[SRU_AT_LEAST_ONE(naive_cell::n_params)], dparams[SRU_AT_LEAST_ONE(naive_cell::n_params)];
  real dper_sequence[SRU_AT_LEAST_ONE(naive_cell::n_per_sequence)];
  for (int i = 0; i < naive_cell::n_state; i++)
    dstate[i] = f.dc_last[i] ? read<acc>(f.dc_last[i], at.state(a)) : real(0);
  for (int i = 0; i < naive_cell::n_params; i++) dparam[i] = real(0);
#pragma unroll 1
  for (index_t t = a.L - 1; t >= 0; t--) {
    const index_t row = at.step(a, t);
    const Values in(a, row, at.j);
    const real dh = read<io>(f.dh, row * a.d + at.j);
    for (int i = 0; i < naive_cell::n_state; i++)
      state[i] = real(read<saved_io>(f.saved[i], (t * a.B * a.D + at.row) * a.d + at.j));
    real dgates[SRU_AT_LEAST_ONE(naive_cell::n_gates)], dinputs[SRU_AT_LEAST_ONE(naive_cell::n_inputs)];
    naive_cell::gradient<real>(in.gate, in.input, fixed.per_sequence, fixed.param, state, fixed.constant, dstate, &dh,
                               dgates, dinputs, dper_sequence, dparams, dold_state);
    for (int i = 0; i < naive_cell::n_state; i++) dstate[i] = dold_state[i];
    for (int i = 0; i < naive_cell::n_params; i++) dparam[i] = dparam[i] + dparams[i];
    for (int i = 0; i < naive_cell::n_gates; i++) write<io>(f.dgate[i].data, row * f.dgate[i].stride + at.j, dgates[i]);
    for (int i = 0; i < naive_cell::n_inputs; i++)
      write<io>(f.dinput[i].data, row * f.dinput[i].stride + at.j, dinputs[i]);
  }
  for (int i = 0; i < naive_cell::n_state; i++) write<acc>(f.dc0[i], at.state(a), dstate[i]);
  for (int i = 0; i < naive_cell::n_params; i++)
    write<acc>(f.partial.data, (at.row * naive_cell::n_params + i) * f.partial.stride + at.j, dparam[i]);
}
