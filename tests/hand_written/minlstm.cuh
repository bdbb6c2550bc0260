// The gradient of minlstm, derived and arranged by hand; step() is the emitted one.
//
//   i = sigmoid(softplus(-(uf + b_f)) - softplus(-(ui + b_i)))
//   n = un + b_n
//   h = (1 - i)*h' + i*n
//
// As mingru.cuh, with i = I/(F + I) for z, of which d log i = (1 - i) (d log I - d log F), and d log s(u) = s(-u) du.
#pragma once

struct minlstm_cell {
  static constexpr int n_gates = 3, n_inputs = 0, n_per_sequence = 0, n_params = 3, n_state = 1, n_constants = 0;
  static constexpr int n_activations = 1;
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
    const real n = un + b_n;
    const real h = fma(real(1.0) - i, h_prev, i * n);
    new_state[0] = h;
    *new_h = h;
    if (activation) activation[0] = i;
  }

  // `dnew_state`, `dnew_h` are the adjoints of what step() returns; the results are those of what it takes.
  // The first `n_known` of `activation` need not be computed.
  template <class real, int n_known = 0>
  SRU_FN void gradient(const real *gate, const real *input, const real *per_sequence, const real *param,
                       const real *state, const real *constant, const real *dnew_state, const real *dnew_h,
                       real *dgate, real *dinput, real *dper_sequence, real *dparam, real *dstate,
                       const real *activation = nullptr) {
    const real h_prev = state[0];
    const real minus_f = -gate[0] - param[0], minus_i = -gate[1] - param[1];
    const real i = softplus_share(minus_f, minus_i);
    const real n = gate[2] + param[2];
    const real dh = dnew_state[0] + *dnew_h;
    const real dn = dh * i;
    const real dh_prev = fma(-dh, i, dh);
    const real q = dh_prev * (n - h_prev) * i;
    const real duf = -q * sigmoid(minus_f);
    const real dui = q * sigmoid(minus_i);
    dgate[0] = duf;
    dgate[1] = dui;
    dgate[2] = dn;
    dparam[0] = duf;
    dparam[1] = dui;
    dparam[2] = dn;
    dstate[0] = dh_prev;
  }
};
