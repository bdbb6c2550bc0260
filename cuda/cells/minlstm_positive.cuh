// clang-format off
// Written by sru_rt from the step function of minlstm_positive; change that one.
//
//   i = sigmoid(softplus(-(uf + b_f)) - softplus(-(ui + b_i)))
//   t1 = un + b_n
//   n = where(t1 >= 0, t1 + 0.5, sigmoid(t1))
//   h = (1 - i)*h' + i*n
#pragma once

struct minlstm_positive_cell {
  static constexpr int n_gates = 3, n_inputs = 0, n_per_sequence = 0, n_params = 3, n_state = 1, n_constants = 0;
  static constexpr int n_activations = 2;
  static constexpr bool affine = true;

  // `activation` gets what gradient() may be told, if it is not null.
  template <class real>
  SRU_FN void step(const real *gate, const real *input, const real *per_sequence, const real *param,
                   const real *state, const real *constant, real *new_state, real *new_h,
                   real *activation = nullptr) {
    const real uf = gate[0], ui = gate[1], un = gate[2];
    const real b_f = param[0], b_i = param[1], b_n = param[2];
    const real h_prev = state[0];
    const real i = softplus_share(-(uf + b_f), -(ui + b_i));
    const real t1 = un + b_n;
    const real n = where(t1 >= real(0.0), t1 + real(0.5), sigmoid(t1));
    const real h = fma(real(1.0) - i, h_prev, i * n);
    new_state[0] = h;
    *new_h = h;
    if (activation) activation[0] = i;
    if (activation) activation[1] = sigmoid(t1);
  }

  // `dnew_state`, `dnew_h` are the adjoints of what step() returns; the results are those of what it takes.
  // The first `n_known` of `activation` need not be computed.
  template <class real, int n_known = 0>
  SRU_FN void gradient(const real *gate, const real *input, const real *per_sequence, const real *param,
                       const real *state, const real *constant, const real *dnew_state, const real *dnew_h,
                       real *dgate, real *dinput, real *dper_sequence, real *dparam, real *dstate,
                       const real *activation = nullptr) {
    const real uf = gate[0], ui = gate[1], un = gate[2];
    const real b_f = param[0], b_i = param[1], b_n = param[2];
    const real h_prev = state[0];
    const real dh_next = dnew_state[0], dh = *dnew_h;
    const real dh2 = dh_next + dh;
    const real t1 = -(uf + b_f);
    const real t2 = -(ui + b_i);
    const real i = n_known > 0 ? activation[0] : softplus_share(t1, t2);
    const real t3 = fma(-dh2, i, dh2);
    const real t4 = un + b_n;
    const real t5 = n_known > 1 ? activation[1] : sigmoid(t4);
    const real n = where(t4 >= real(0.0), t4 + real(0.5), t5);
    const real t6 = t3 * (n - h_prev) * i;
    const real duf = -(t6 * sigmoid(t1));
    const real dui = t6 * sigmoid(t2);
    const real dn = dh2 * i;
    const real t7 = dn * t5;
    const real dun = where(t4 >= real(0.0), dn, fma(-t7, t5, t7));
    dgate[0] = duf;
    dgate[1] = dui;
    dgate[2] = dun;
    dparam[0] = duf;
    dparam[1] = dui;
    dparam[2] = dun;
    dstate[0] = t3;
  }

  // The derivatives of the new states by the states, row by row.
  template <class real>
  SRU_FN void jacobian(const real *gate, const real *input, const real *per_sequence, const real *param,
                       const real *state, const real *constant, real *jacobian) {
    const real uf = gate[0], ui = gate[1];
    const real b_f = param[0], b_i = param[1];
    const real i = softplus_share(-(uf + b_f), -(ui + b_i));
    jacobian[0] = real(1.0) - i;
  }
};
