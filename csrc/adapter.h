// The adapters' own work, shared by all operators that have one: everything but the base GEMM.
#pragma once

#include <optional>
#include <vector>

#include "tensor.h"

namespace hal {

struct Factors {
  const Tensor &p, &lam, &q;  // [r, d_in], [r], [r, d_out]

  int64_t rank() const { return p.size(0); }

  bool fit(int64_t d_in, int64_t d_out) const {
    return p.dim() == 2 && q.dim() == 2 && p.size(1) == d_in && q.size(0) == rank() &&
           q.size(1) == d_out && lam.dim() == 1 && lam.size(0) == rank();
  }
};

// One of the layers that read x.
struct Layer {
  Factors factors;
  // Forward, what y starts from: [1, d_out] for all rows or [T, d_out] one each. Backward, dy.
  // Absent: zero.
  std::optional<Rows> rows;
};

inline int64_t total_rank(const std::vector<Layer>& layers) {
  int64_t rank = 0;
  for (const Layer& layer : layers) rank += layer.factors.rank();
  return rank;
}

inline void check_h(const Tensor& h, const Rows& x, const std::vector<Layer>& layers) {
  if (h.dim() != 2 || h.size(0) != x.count || h.size(1) != total_rank(layers))
    throw std::runtime_error("hal: h does not fit x and the ranks");
}

struct Options {
  double scaling;
  double tangent;  // c of the tangent gradients of P and Q; 0 for their own
  double dropout;
  const Tensor* seed;  // of the dropout mask; null for none

  Options(double scaling, double tangent, double dropout, const std::optional<Tensor>& seed)
      : scaling(scaling),
        tangent(tangent),
        dropout(dropout),
        seed(seed && dropout > 0.0 ? &*seed : nullptr) {
    if (seed && (seed->scalar_type() != ScalarType::Long || seed->numel() != 1))
      throw std::runtime_error("hal: the seed is not one int64");
  }
};

// y_i = base_i + s·(h_i⊙Λ_i)Q_i with h = dropout(x)[P_1 … P_n], in one pass over the rows of x.
// Writes y_i [T, d_out_i] and h [T, r_1 + … + r_n].
void adapter_forward(const Rows& x, const std::vector<Layer>& layers, const Options& options,
                     const std::vector<Tensor>& y, const Tensor& h);

struct FactorGradients {
  Tensor dp, dlam;  // of all layers, one behind the other
  std::vector<Tensor> dq;
};

// With u_i = dy_i·Q_iᵀ, in one pass over the rows of all dy and x:
//   dx = s·Σ(u_i⊙Λ_i)P_iᵀ   dP_i = s·xᵀ(u_i⊙Λ_i)   dΛ_i = s·Σ h_i⊙u_i   dQ_i = s·(h_i⊙Λ_i)ᵀdy_i
// With c = `tangent` other than 0, dP_i = c·xᵀu_i and dQ_i = c·h_iᵀdy_i, and dΛ is empty.
// dx may be null. The others are empty without `needs_factors`.
FactorGradients adapter_backward(const Rows& x, const std::vector<Layer>& layers,
                                 const Options& options, const Tensor& h, const Tensor* dx,
                                 bool needs_factors);

}  // namespace hal
