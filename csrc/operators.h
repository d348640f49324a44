// The operators of hal_kernels/ops that are written here; documentation and formulas are there.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "tensor.h"

namespace hal {

std::tuple<Tensor, Tensor> svd_linear(const Tensor& x, const std::optional<Tensor>& weight,
                                      const std::optional<Tensor>& base, const Tensor& p,
                                      const Tensor& lam, const Tensor& q, double scaling,
                                      double dropout, const std::optional<Tensor>& seed);

std::tuple<Tensor, Tensor, Tensor, Tensor> svd_linear_backward(
    const Tensor& dy, const Tensor& x, const Tensor& h, const std::optional<Tensor>& weight,
    const Tensor& p, const Tensor& lam, const Tensor& q, double scaling, double dropout,
    const std::optional<Tensor>& seed, double tangent, bool needs_dx, bool needs_factors);

std::tuple<std::vector<Tensor>, Tensor> svd_linear_group(
    const Tensor& x, std::vector<Tensor> weight, std::vector<std::optional<Tensor>> bias,
    std::vector<Tensor> p, std::vector<Tensor> lam, std::vector<Tensor> q, double scaling,
    double dropout, const std::optional<Tensor>& seed);

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> svd_linear_group_backward(
    std::vector<std::optional<Tensor>> dy, const Tensor& x, const Tensor& h,
    std::vector<Tensor> weight, std::vector<Tensor> p, std::vector<Tensor> lam,
    std::vector<Tensor> q, double scaling, double dropout, const std::optional<Tensor>& seed,
    double tangent, bool needs_dx, bool needs_factors);

std::tuple<Tensor, std::vector<Tensor>> orthogonality_penalty(std::vector<Tensor> factors,
                                                              std::vector<Tensor> offsets,
                                                              std::vector<int64_t> max_ranks,
                                                              bool squared, double weight);

std::vector<Tensor> orthogonality_penalty_backward(Tensor dvalue, std::vector<Tensor> factors,
                                                   std::vector<Tensor> residuals,
                                                   std::vector<Tensor> offsets,
                                                   std::vector<int64_t> max_ranks, bool squared,
                                                   double weight);

}  // namespace hal
