// The gradient of qrnn_ifo, derived and arranged by hand; step() is the emitted one.
//
//   f = sigmoid(uf + b_f)
//   z = tanh(uz + b_z)
//   c = f*c' + sigmoid(ui + b_i)*z
//   out = sigmoid(uo + b_o)
//   h = out*c
//
// What passes each gate, times one minus the gate, is the gradient before its sigmoid.
#pragma once

struct qrnn_ifo_cell {
  static constexpr int n_gates = 4, n_inputs = 0, n_per_sequence = 0, n_params = 4, n_state = 1, n_constants = 0;
  static constexpr int n_activations = 3;
  static constexpr bool affine = true;

  // `activation` gets what gradient() may be told, if it is not null.
  template <class real>
  SRU_FN void step(const real *gate, const real *input, const real *per_sequence, const real *param,
                   const real *state, const real *constant, real *new_state, real *new_h,
                   real *activation = nullptr) {
    const real uz = gate[0], uf = gate[1], uo = gate[2], ui = gate[3];
    const real b_z = param[0], b_f = param[1], b_o = param[2], b_i = param[3];
    const real c_prev = state[0];
    const real f = sigmoid(uf + b_f);
    const real z = tanh(uz + b_z);
    const real c = fma(f, c_prev, sigmoid(ui + b_i) * z);
    const real out = sigmoid(uo + b_o);
    new_state[0] = c;
    *new_h = out * c;
    if (activation) activation[0] = z;
    if (activation) activation[1] = sigmoid(ui + b_i);
    if (activation) activation[2] = f;
  }

  // `dnew_state`, `dnew_h` are the adjoints of what step() returns; the results are those of what it takes.
  // The first `n_known` of `activation` need not be computed.
  template <class real, int n_known = 0>
  SRU_FN void gradient(const real *gate, const real *input, const real *per_sequence, const real *param,
                       const real *state, const real *constant, const real *dnew_state, const real *dnew_h,
                       real *dgate, real *dinput, real *dper_sequence, real *dparam, real *dstate,
                       const real *activation = nullptr) {
    const real c_prev = state[0], dh = *dnew_h;
    const real z = tanh(gate[0] + param[0]);
    const real f = sigmoid(gate[1] + param[1]);
    const real o = sigmoid(gate[2] + param[2]);
    const real i = sigmoid(gate[3] + param[3]);
    const real c = fma(f, c_prev, i * z);
    const real through_o = dh * o;
    const real dc = dnew_state[0] + through_o;
    const real through_f = dc * f;
    const real dz = dc * i;
    const real dz_z = dz * z;
    const real duz = fma(-dz_z, z, dz);
    const real dui = fma(-dz_z, i, dz_z);
    const real p = through_f * c_prev;
    const real duf = fma(-p, f, p);
    const real q = through_o * c;
    const real duo = fma(-q, o, q);
    dgate[0] = duz;
    dgate[1] = duf;
    dgate[2] = duo;
    dgate[3] = dui;
    dparam[0] = duz;
    dparam[1] = duf;
    dparam[2] = duo;
    dparam[3] = dui;
    dstate[0] = through_f;
  }
};
