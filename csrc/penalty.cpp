// weight·Σ‖FFᵀ − I‖ over all matrices at once, and its gradient; the matrices spread over threads.

#include <cmath>

#include "operators.h"

namespace hal {

namespace {

// First row of each matrix, checked: what is read and written lies inside of the tensors.
std::vector<int64_t> starts(const Tensor& offsets, int64_t rows, int64_t max_rank) {
  if (offsets.scalar_type() != ScalarType::Long || offsets.dim() != 1 || offsets.size(0) < 1)
    throw std::runtime_error("hal::orthogonality_penalty: offsets is not an int64 vector");
  const Tensor held = dense(offsets);
  const int64_t* from = data<int64_t>(held);
  const std::vector<int64_t> out(from, from + held.numel());
  for (size_t g = 0; g + 1 < out.size(); ++g)
    if (out[g] < 0 || out[g + 1] < out[g] || out[g + 1] > rows || out[g + 1] - out[g] > max_rank)
      throw std::runtime_error(
          "hal::orthogonality_penalty: offsets do not ascend from 0 to the number of rows by "
          "max_rank at most");
  return out;
}

void check_lists(size_t factors, size_t offsets, size_t ranks, size_t residuals) {
  if (factors != offsets || factors != ranks || factors != residuals)
    throw std::runtime_error("hal::orthogonality_penalty: lists of unequal length");
}

// Residuals R = FFᵀ − I [G, m, m] of one width, zero beyond a matrix's own rows; their norms.
template <class A>
void residuals_of(const Tensor& factor, const std::vector<int64_t>& start, int64_t m,
                  const Tensor& residual, std::vector<double>& norms) {
  const Values<A> rows(factor);
  const int64_t d = factor.size(1), count = static_cast<int64_t>(start.size()) - 1;
  A* const out = mutable_data<A>(residual);
  std::fill_n(out, count * m * m, A(0));
  const bool wide = m > HIGHEST_FUSED;
  for (int64_t g = 0; wide && g < count; ++g) {
    const int64_t r = start[g + 1] - start[g];
    const Tensor f = view2d(rows.tensor(), r, d, d, 1, start[g] * d);
    multiply(view2d(residual, r, r, m, 1, g * m * m), f, transposed(f));
  }
  const size_t first = norms.size();
  norms.resize(first + count);
  const int64_t n = parts(count, m * m * (wide ? 1 : d));
  parallel(n, [&](int64_t part) {
    for (int64_t g = count * part / n; g < count * (part + 1) / n; ++g) {
      const A* f = rows.get() + start[g] * d;
      const int64_t r = start[g + 1] - start[g];
      A* const to = out + g * m * m;
      if (!wide) kernels<A>().shrink(f, d, f, to, m, r, r, d);
      double squares = 0;
      for (int64_t i = 0; i < r; ++i) {
        to[i * m + i] -= A(1);
        for (int64_t j = 0; j < r; ++j) squares += double(to[i * m + j]) * double(to[i * m + j]);
      }
      norms[first + g] = std::sqrt(squares);
    }
  });
}

// c [r, r] = R·scale, or R·scale/‖R‖ of the unsquared norm
template <class A>
void scaled_residual(const A* residual, int64_t m, int64_t r, bool squared, double scale, A* c) {
  if (!squared) {
    double squares = 0;
    for (int64_t i = 0; i < m * m; ++i) squares += double(residual[i]) * double(residual[i]);
    scale = squares == 0 ? 0.0 : scale / std::sqrt(squares);
  }
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < r; ++j) c[i * r + j] = static_cast<A>(residual[i * m + j] * scale);
}

template <class A>
Tensor gradient_of(const Tensor& factor, const Tensor& residual, const std::vector<int64_t>& start,
                   bool squared, double scale) {
  const Values<A> rows(factor), residuals(residual);
  const int64_t d = factor.size(1), m = residual.size(1);
  const int64_t count = static_cast<int64_t>(start.size()) - 1;
  const Tensor made = empty_as(factor, type_of<A>());
  // Rows of no matrix have no gradient.
  const bool covered = count > 0 && start[0] == 0 && start[count] == factor.size(0);
  if (!covered) torch::stable::fill_(made, 0.0);
  if (m > HIGHEST_FUSED) {
    const Tensor c = empty({m, m}, type_of<A>());
    for (int64_t g = 0; g < count; ++g) {
      const int64_t r = start[g + 1] - start[g];
      scaled_residual(residuals.get() + g * m * m, m, r, squared, scale, mutable_data<A>(c));
      multiply(view2d(made, r, d, d, 1, start[g] * d), view2d(c, r, r, r),
               view2d(rows.tensor(), r, d, d, 1, start[g] * d));
    }
  } else {
    A* const to = mutable_data<A>(made);
    const int64_t n = parts(count, m * m * d);
    parallel(n, [&](int64_t part) {
      const auto c = scratch<A>(m * m);
      for (int64_t g = count * part / n; g < count * (part + 1) / n; ++g) {
        const int64_t r = start[g + 1] - start[g];
        scaled_residual(residuals.get() + g * m * m, m, r, squared, scale, c.get());
        kernels<A>().expand(c.get(), rows.get() + start[g] * d, nullptr, 0, to + start[g] * d, d, r,
                            r, d);
      }
    });
  }
  return in_dtype<A>(made, factor.scalar_type());
}

}  // namespace

std::tuple<Tensor, std::vector<Tensor>> orthogonality_penalty(std::vector<Tensor> factors,
                                                              std::vector<Tensor> offsets,
                                                              std::vector<int64_t> max_ranks,
                                                              bool squared, double weight) {
  check_lists(factors.size(), offsets.size(), max_ranks.size(), factors.size());
  std::vector<Tensor> residuals;
  std::vector<double> norms;
  for (size_t e = 0; e < factors.size(); ++e) {
    const ScalarType dtype = accumulated(factors[e].scalar_type());
    const auto start = starts(offsets[e], factors[e].size(0), max_ranks[e]);
    const int64_t count = static_cast<int64_t>(start.size()) - 1;
    residuals.push_back(empty({count, max_ranks[e], max_ranks[e]}, dtype));
    if (dtype == ScalarType::Double)
      residuals_of<double>(factors[e], start, max_ranks[e], residuals[e], norms);
    else
      residuals_of<float>(factors[e], start, max_ranks[e], residuals[e], norms);
  }
  double total = 0;
  for (const double norm : norms) total += squared ? norm * norm : norm;
  total *= weight;
  const Tensor value = empty({}, accumulated(factors.at(0).scalar_type()));
  assign(value, &total, 1);
  return {value, residuals};
}

std::vector<Tensor> orthogonality_penalty_backward(Tensor dvalue, std::vector<Tensor> factors,
                                                   std::vector<Tensor> residuals,
                                                   std::vector<Tensor> offsets,
                                                   std::vector<int64_t> max_ranks, bool squared,
                                                   double weight) {
  check_lists(factors.size(), offsets.size(), max_ranks.size(), residuals.size());
  const Values<double> upstream(dvalue);
  const double scale = *upstream.get() * weight * (squared ? 4.0 : 2.0);
  std::vector<Tensor> gradients;
  for (size_t e = 0; e < factors.size(); ++e) {
    const auto start = starts(offsets[e], factors[e].size(0), max_ranks[e]);
    const int64_t count = static_cast<int64_t>(start.size()) - 1;
    if (residuals[e].numel() != count * max_ranks[e] * max_ranks[e])
      throw std::runtime_error("hal::orthogonality_penalty_backward: residuals do not fit");
    if (accumulated(factors[e].scalar_type()) == ScalarType::Double)
      gradients.push_back(gradient_of<double>(factors[e], residuals[e], start, squared, scale));
    else
      gradients.push_back(gradient_of<float>(factors[e], residuals[e], start, squared, scale));
  }
  return gradients;
}

}  // namespace hal
