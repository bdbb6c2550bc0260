// clang-format off
// Written by sru_rt from the step function of mingru; change that one.
//
//   z = sigmoid(uz + b_z)
//   n = un + b_n
//   h = (1 - z)*h' + z*n
#pragma once

struct mingru_cell {
  static constexpr int n_gates = 2, n_inputs = 0, n_per_sequence = 0, n_params = 2, n_state = 1, n_constants = 0;
  static constexpr int n_activations = 1;
  static constexpr bool affine = true;

  // `activation` gets what gradient() may be told, if it is not null.
  template <class real>
  SRU_FN void step(const real *gate, const real *input, const real *per_sequence, const real *param,
                   const real *state, const real *constant, real *new_state, real *new_h,
                   real *activation = nullptr) {
    const real uz = gate[0], un = gate[1];
    const real b_z = param[0], b_n = param[1];
    const real h_prev = state[0];
    const real z = sigmoid(uz + b_z);
    const real n = un + b_n;
    const real h = fma(real(1.0) - z, h_prev, z * n);
    new_state[0] = h;
    *new_h = h;
    if (activation) activation[0] = z;
  }

  // `dnew_state`, `dnew_h` are the adjoints of what step() returns; the results are those of what it takes.
  // The first `n_known` of `activation` need not be computed.
  template <class real, int n_known = 0>
  SRU_FN void gradient(const real *gate, const real *input, const real *per_sequence, const real *param,
                       const real *state, const real *constant, const real *dnew_state, const real *dnew_h,
                       real *dgate, real *dinput, real *dper_sequence, real *dparam, real *dstate,
                       const real *activation = nullptr) {
    const real uz = gate[0], un = gate[1];
    const real b_z = param[0], b_n = param[1];
    const real h_prev = state[0];
    const real dh_next = dnew_state[0], dh = *dnew_h;
    const real dh2 = dh_next + dh;
    const real z = n_known > 0 ? activation[0] : sigmoid(uz + b_z);
    const real t1 = fma(-dh2, z, dh2);
    const real n = un + b_n;
    const real duz = t1 * (n - h_prev) * z;
    const real dn = dh2 * z;
    dgate[0] = duz;
    dgate[1] = dn;
    dparam[0] = duz;
    dparam[1] = dn;
    dstate[0] = t1;
  }

  // The derivatives of the new states by the states, row by row.
  template <class real>
  SRU_FN void jacobian(const real *gate, const real *input, const real *per_sequence, const real *param,
                       const real *state, const real *constant, real *jacobian) {
    const real uz = gate[0];
    const real b_z = param[0];
    const real z = sigmoid(uz + b_z);
    jacobian[0] = real(1.0) - z;
  }
};
