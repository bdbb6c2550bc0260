// clang-format off
// Written by sru_rt from the step function of qrnn_ifo; change that one.
//
//   f = sigmoid(uf + b_f)
//   z = tanh(uz + b_z)
//   c = f*c' + sigmoid(ui + b_i)*z
//   out = sigmoid(uo + b_o)
//   h = out*c
#pragma once

struct qrnn_ifo_cell {
  static constexpr int n_gates = 4, n_inputs = 0, n_per_sequence = 0, n_params = 4, n_state = 1, n_constants = 0;
  static constexpr bool affine = true;

  template <class real>
  SRU_FN void step(const real *gate, const real *input, const real *per_sequence, const real *param,
                   const real *state, const real *constant, real *new_state, real *new_h) {
    const real uz = gate[0], uf = gate[1], uo = gate[2], ui = gate[3];
    const real b_z = param[0], b_f = param[1], b_o = param[2], b_i = param[3];
    const real c_prev = state[0];
    const real f = sigmoid(uf + b_f);
    const real z = tanh(uz + b_z);
    const real c = fma(f, c_prev, sigmoid(ui + b_i) * z);
    const real out = sigmoid(uo + b_o);
    new_state[0] = c;
    *new_h = out * c;
  }

  // `dnew_state`, `dnew_h` are the adjoints of what step() returns; the results are those of what it takes.
  template <class real>
  SRU_FN void gradient(const real *gate, const real *input, const real *per_sequence, const real *param,
                       const real *state, const real *constant, const real *dnew_state, const real *dnew_h,
                       real *dgate, real *dinput, real *dper_sequence, real *dparam, real *dstate) {
    const real uz = gate[0], uf = gate[1], uo = gate[2], ui = gate[3];
    const real b_z = param[0], b_f = param[1], b_o = param[2], b_i = param[3];
    const real c_prev = state[0];
    const real dc_next = dnew_state[0], dh = *dnew_h;
    const real out = sigmoid(uo + b_o);
    const real dc = fma(dh, out, dc_next);
    const real t1 = sigmoid(ui + b_i);
    const real dz = dc * t1;
    const real z = tanh(uz + b_z);
    const real t2 = dz * fma(-z, z, real(1.0));
    const real df = dc * c_prev;
    const real f = sigmoid(uf + b_f);
    const real t3 = df * (f * (real(1.0) - f));
    const real c = fma(f, c_prev, t1 * z);
    const real dout = dh * c;
    const real t4 = dout * (out * (real(1.0) - out));
    const real t5 = dc * z * (t1 * (real(1.0) - t1));
    dgate[0] = t2;
    dgate[1] = t3;
    dgate[2] = t4;
    dgate[3] = t5;
    dparam[0] = t2;
    dparam[1] = t3;
    dparam[2] = t4;
    dparam[3] = t5;
    dstate[0] = dc * f;
  }
};
