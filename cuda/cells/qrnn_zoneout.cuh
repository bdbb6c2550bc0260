// clang-format off
// Written by sru_rt from the step function of qrnn_zoneout; change that one.
//
//   f = 1 - zoneout*(1 - sigmoid(uf + b_f))
//   z = tanh(uz + b_z)
//   c = f*c' + (1 - f)*z
//   out = sigmoid(uo + b_o)
//   h = out*c
#pragma once

struct qrnn_zoneout_cell {
  static constexpr int n_gates = 3, n_inputs = 1, n_per_sequence = 0, n_params = 3, n_state = 1, n_constants = 0;
  static constexpr int n_activations = 2;
  static constexpr bool affine = true;

  // `activation` gets what gradient() may be told, if it is not null.
  template <class real>
  SRU_FN void step(const real *gate, const real *input, const real *per_sequence, const real *param,
                   const real *state, const real *constant, real *new_state, real *new_h,
                   real *activation = nullptr) {
    const real uz = gate[0], uf = gate[1], uo = gate[2];
    const real zoneout = input[0];
    const real b_z = param[0], b_f = param[1], b_o = param[2];
    const real c_prev = state[0];
    const real f = fma(-zoneout, real(1.0) - sigmoid(uf + b_f), real(1.0));
    const real z = tanh(uz + b_z);
    const real c = fma(f, c_prev, (real(1.0) - f) * z);
    const real out = sigmoid(uo + b_o);
    new_state[0] = c;
    *new_h = out * c;
    if (activation) activation[0] = z;
    if (activation) activation[1] = sigmoid(uf + b_f);
  }

  // `dnew_state`, `dnew_h` are the adjoints of what step() returns; the results are those of what it takes.
  // The first `n_known` of `activation` need not be computed.
  template <class real, int n_known = 0>
  SRU_FN void gradient(const real *gate, const real *input, const real *per_sequence, const real *param,
                       const real *state, const real *constant, const real *dnew_state, const real *dnew_h,
                       real *dgate, real *dinput, real *dper_sequence, real *dparam, real *dstate,
                       const real *activation = nullptr) {
    const real uz = gate[0], uf = gate[1], uo = gate[2];
    const real zoneout = input[0];
    const real b_z = param[0], b_f = param[1], b_o = param[2];
    const real c_prev = state[0];
    const real dc_next = dnew_state[0], dh = *dnew_h;
    const real out = sigmoid(uo + b_o);
    const real dc = fma(dh, out, dc_next);
    const real t1 = n_known > 1 ? activation[1] : sigmoid(uf + b_f);
    const real f = real(1.0) - fma(-zoneout, t1, zoneout);
    const real dz = fma(-dc, f, dc);
    const real z = n_known > 0 ? activation[0] : tanh(uz + b_z);
    const real duz = dz * fma(-z, z, real(1.0));
    const real t2 = dc * (z - c_prev);
    const real dzoneout = fma(-t2, t1, t2);
    const real duf = -(dzoneout * zoneout * t1);
    const real c = fma(f, c_prev, fma(-z, f, z));
    const real dout = dh * c;
    const real t3 = dout * out;
    const real duo = fma(-t3, out, t3);
    dgate[0] = duz;
    dgate[1] = duf;
    dgate[2] = duo;
    dinput[0] = dzoneout;
    dparam[0] = duz;
    dparam[1] = duf;
    dparam[2] = duo;
    dstate[0] = dc * f;
  }

  // The derivatives of the new states by the states, row by row.
  template <class real>
  SRU_FN void jacobian(const real *gate, const real *input, const real *per_sequence, const real *param,
                       const real *state, const real *constant, real *jacobian) {
    const real uf = gate[1];
    const real zoneout = input[0];
    const real b_f = param[1];
    const real f = fma(-zoneout, real(1.0) - sigmoid(uf + b_f), real(1.0));
    jacobian[0] = f;
  }
};
