// The gradient of qrnn, derived and arranged by hand; step() is the emitted one.
//
//   f = sigmoid(uf + b_f)
//   z = tanh(uz + b_z)
//   c = f*c' + (1 - f)*z
//   out = sigmoid(uo + b_o)
//   h = out*c
//
// dz = dc*(1 - f) serves z and f. The output gate takes dh*h*(1 - o).
#pragma once

struct qrnn_cell {
  static constexpr int n_gates = 3, n_inputs = 0, n_per_sequence = 0, n_params = 3, n_state = 1, n_constants = 0;
  static constexpr int n_activations = 2;
  static constexpr bool affine = true;

  // `activation` gets what gradient() may be told, if it is not null.
  template <class real>
  SRU_FN void step(const real *gate, const real *input, const real *per_sequence, const real *param,
                   const real *state, const real *constant, real *new_state, real *new_h,
                   real *activation = nullptr) {
    const real uz = gate[0], uf = gate[1], uo = gate[2];
    const real b_z = param[0], b_f = param[1], b_o = param[2];
    const real c_prev = state[0];
    const real f = sigmoid(uf + b_f);
    const real z = tanh(uz + b_z);
    const real c = fma(f, c_prev, (real(1.0) - f) * z);
    const real out = sigmoid(uo + b_o);
    new_state[0] = c;
    *new_h = out * c;
    if (activation) activation[0] = z;
    if (activation) activation[1] = f;
  }

  // `dnew_state`, `dnew_h` are the adjoints of what step() returns; the results are those of what it takes.
  // The first `n_known` of `activation` need not be computed.
  template <class real, int n_known = 0>
  SRU_FN void gradient(const real *gate, const real *input, const real *per_sequence, const real *param,
                       const real *state, const real *constant, const real *dnew_state, const real *dnew_h,
                       real *dgate, real *dinput, real *dper_sequence, real *dparam, real *dstate,
                       const real *activation = nullptr) {
    const real dh = *dnew_h;
    const real z = tanh(gate[0] + param[0]);
    const real f = sigmoid(gate[1] + param[1]);
    const real o = sigmoid(gate[2] + param[2]);
    const real change = state[0] - z;
    const real h = o * fma(f, state[0], fma(-z, f, z));
    const real dc = fma(dh, o, dnew_state[0]);
    const real dz = fma(-dc, f, dc);
    const real duz = fma(-dz * z, z, dz);
    const real duf = dz * change * f;
    const real q = dh * h;
    const real duo = fma(-q, o, q);
    dgate[0] = duz;
    dgate[1] = duf;
    dgate[2] = duo;
    dparam[0] = duz;
    dparam[1] = duf;
    dparam[2] = duo;
    dstate[0] = dc * f;
  }
};
