// clang-format off
// Written by sru_rt from the step function of sru; change that one.
//
//   f = sigmoid(uf + b_f + v_f*c')
//   c = f*c' + (1 - f)*u0
//   skip = alpha*x
//   r = sigmoid(ur + b_r + v_r*c')
//   h = skip + (c - skip)*r
#pragma once

struct sru_cell {
  static constexpr int n_gates = 3, n_inputs = 1, n_per_sequence = 0, n_params = 4, n_state = 1, n_constants = 1;
  static constexpr int n_activations = 1;
  static constexpr bool affine = false;

  // `activation` gets what gradient() may be told, if it is not null.
  template <class real>
  SRU_FN void step(const real *gate, const real *input, const real *per_sequence, const real *param,
                   const real *state, const real *constant, real *new_state, real *new_h,
                   real *activation = nullptr) {
    const real u0 = gate[0], uf = gate[1], ur = gate[2];
    const real x = input[0];
    const real b_f = param[0], b_r = param[1], v_f = param[2], v_r = param[3];
    const real c_prev = state[0];
    const real alpha = constant[0];
    const real f = sigmoid_fma(v_f, c_prev, uf + b_f);
    const real c = fma(f, c_prev, fma(-u0, f, u0));
    const real skip = alpha * x;
    const real r = sigmoid_fma(v_r, c_prev, ur + b_r);
    const real h = fma(c - skip, r, skip);
    new_state[0] = c;
    *new_h = h;
    if (activation) activation[0] = f;
  }

  // `dnew_state`, `dnew_h` are the adjoints of what step() returns; the results are those of what it takes.
  // The first `n_known` of `activation` need not be computed.
  template <class real, int n_known = 0>
  SRU_FN void gradient(const real *gate, const real *input, const real *per_sequence, const real *param,
                       const real *state, const real *constant, const real *dnew_state, const real *dnew_h,
                       real *dgate, real *dinput, real *dper_sequence, real *dparam, real *dstate,
                       const real *activation = nullptr) {
    const real u0 = gate[0], uf = gate[1], ur = gate[2];
    const real x = input[0];
    const real b_f = param[0], b_r = param[1], v_f = param[2], v_r = param[3];
    const real c_prev = state[0];
    const real alpha = constant[0];
    const real dc_next = dnew_state[0], dh = *dnew_h;
    const real r = sigmoid_fma(v_r, c_prev, ur + b_r);
    const real t1 = dh * r;
    const real dc = dc_next + t1;
    const real f = n_known > 0 ? activation[0] : sigmoid_fma(v_f, c_prev, uf + b_f);
    const real du0 = fma(-dc, f, dc);
    const real duf = du0 * (c_prev - u0) * f;
    const real c = fma(f, c_prev, fma(-u0, f, u0));
    const real t2 = t1 * fma(-alpha, x, c);
    const real dur = fma(-t2, r, t2);
    const real dskip = dh - t1;
    const real dx = dskip * alpha;
    dgate[0] = du0;
    dgate[1] = duf;
    dgate[2] = dur;
    dinput[0] = dx;
    dparam[0] = duf;
    dparam[1] = dur;
    dparam[2] = duf * c_prev;
    dparam[3] = dur * c_prev;
    dstate[0] = fma(duf, v_f, fma(dur, v_r, dc * f));
  }

  // The derivatives of the new states by the states, row by row.
  template <class real>
  SRU_FN void jacobian(const real *gate, const real *input, const real *per_sequence, const real *param,
                       const real *state, const real *constant, real *jacobian) {
    const real u0 = gate[0], uf = gate[1];
    const real b_f = param[0], v_f = param[2];
    const real c_prev = state[0];
    const real f = sigmoid_fma(v_f, c_prev, uf + b_f);
    jacobian[0] = fma((c_prev - u0) * (f * (real(1.0) - f)), v_f, f);
  }
};
