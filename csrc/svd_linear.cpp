// y = xWᵀ + b + s·(h⊙Λ)Q, of one layer or of several that share x; without a weight, the adapter added
// to the output of any base layer. The base GEMM is torch's, and it adds to an output that holds the
// rest already. A frozen layer writes its bias and runs one GEMM; an adapted one passes over y no more
// often than that.

#include "adapter.h"
#include "operators.h"

namespace hal {

namespace {

using Weights = std::vector<std::optional<Tensor>>;

// `backward`: the rows that each layer has are the gradients of its output, else what y starts from.
void check(const Rows& x, const Weights& weights, const std::vector<Layer>& layers, bool backward) {
  const ScalarType dtype = x.tensor.scalar_type();
  const Factors& leading = layers.at(0).factors;
  for (size_t i = 0; i < layers.size(); ++i) {
    const auto& [factors, rows] = layers[i];
    const std::optional<Tensor>& weight = weights[i];
    const int64_t d_out = factors.q.dim() == 2 ? factors.q.size(1) : -1;
    const int64_t count = weight && !backward ? 1 : x.count;
    const bool fits = factors.fit(x.width, d_out) &&
                      (weight ? weight->dim() == 2 && weight->size(0) == d_out &&
                                    weight->size(1) == x.width && weight->scalar_type() == dtype
                              : backward || rows.has_value()) &&
                      factors.p.scalar_type() == leading.p.scalar_type() &&
                      factors.lam.scalar_type() == leading.lam.scalar_type() &&
                      (!rows || (rows->count == count && rows->width == d_out &&
                                 rows->tensor.scalar_type() == dtype));
    if (!fits) throw std::runtime_error("hal::svd_linear: shapes or dtypes do not fit together");
  }
}

std::tuple<std::vector<Tensor>, Tensor> forward(const Tensor& x, const Weights& weights,
                                                const std::vector<Layer>& layers,
                                                const Options& options) {
  const Rows rows(x);
  check(rows, weights, layers, false);
  std::vector<Tensor> y;
  const auto sizes = x.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  for (const Layer& layer : layers) {
    shape.back() = layer.factors.q.size(1);
    y.push_back(empty(shape.data(), x.dim(), x.scalar_type()));
  }
  const Tensor h = empty({rows.count, total_rank(layers)}, accumulated(x.scalar_type()));
  adapter_forward(rows, layers, options, y, h);
  for (size_t i = 0; i < y.size(); ++i) {
    if (!weights[i]) continue;
    const int64_t d_out = weights[i]->size(0);
    const Tensor out = view2d(y[i], rows.count, d_out, d_out);
    multiply_add(out, out, rows.matrix(), transposed(*weights[i]));
  }
  return {y, h};
}

std::tuple<Tensor, FactorGradients> backward(const Tensor& x, const Weights& weights,
                                             const std::vector<Layer>& layers,
                                             const Options& options, const Tensor& h, bool needs_dx,
                                             bool needs_factors) {
  const Rows rows(x);
  check(rows, weights, layers, true);
  check_h(h, rows, layers);
  const Tensor dx = needs_dx ? empty_as(x) : empty({0}, x.scalar_type());
  FactorGradients gradients =
      adapter_backward(rows, layers, options, h, needs_dx ? &dx : nullptr, needs_factors);
  if (needs_dx) {
    const Tensor out = view2d(dx, rows.count, rows.width, rows.width);
    for (size_t i = 0; i < layers.size(); ++i)
      if (weights[i] && layers[i].rows)
        multiply_add(out, out, layers[i].rows->matrix(), *weights[i]);
  }
  return {dx, gradients};
}

std::vector<Layer> layers_of(const std::vector<Tensor>& weight, const std::vector<Tensor>& p,
                             const std::vector<Tensor>& lam, const std::vector<Tensor>& q,
                             size_t rows) {
  const size_t n = weight.size();
  if (n == 0 || p.size() != n || lam.size() != n || q.size() != n || rows != n)
    throw std::runtime_error("hal::svd_linear_group: lists of unequal length, or of none");
  std::vector<Layer> layers;
  for (size_t i = 0; i < n; ++i) layers.push_back({{p[i], lam[i], q[i]}, std::nullopt});
  return layers;
}

}  // namespace

std::tuple<Tensor, Tensor> svd_linear(const Tensor& x, const std::optional<Tensor>& weight,
                                      const std::optional<Tensor>& base, const Tensor& p,
                                      const Tensor& lam, const Tensor& q, double scaling,
                                      double dropout, const std::optional<Tensor>& seed) {
  Layer layer = {{p, lam, q}, std::nullopt};
  if (base) layer.rows.emplace(*base);
  const auto [y, h] = forward(x, {weight}, {layer}, {scaling, 0.0, dropout, seed});
  return {y[0], h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> svd_linear_backward(
    const Tensor& dy, const Tensor& x, const Tensor& h, const std::optional<Tensor>& weight,
    const Tensor& p, const Tensor& lam, const Tensor& q, double scaling, double dropout,
    const std::optional<Tensor>& seed, double tangent, bool needs_dx, bool needs_factors) {
  const Layer layer = {{p, lam, q}, Rows(dy)};
  const auto [dx, gradients] =
      backward(x, {weight}, {layer}, {scaling, tangent, dropout, seed}, h, needs_dx, needs_factors);
  return {dx, gradients.dp, gradients.dlam, gradients.dq[0]};
}

std::tuple<std::vector<Tensor>, Tensor> svd_linear_group(
    const Tensor& x, std::vector<Tensor> weight, std::vector<std::optional<Tensor>> bias,
    std::vector<Tensor> p, std::vector<Tensor> lam, std::vector<Tensor> q, double scaling,
    double dropout, const std::optional<Tensor>& seed) {
  auto layers = layers_of(weight, p, lam, q, bias.size());
  for (size_t i = 0; i < layers.size(); ++i)
    if (bias[i]) layers[i].rows.emplace(*bias[i]);
  return forward(x, Weights(weight.begin(), weight.end()), layers,
                 {scaling, 0.0, dropout, seed});
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> svd_linear_group_backward(
    std::vector<std::optional<Tensor>> dy, const Tensor& x, const Tensor& h,
    std::vector<Tensor> weight, std::vector<Tensor> p, std::vector<Tensor> lam,
    std::vector<Tensor> q, double scaling, double dropout, const std::optional<Tensor>& seed,
    double tangent, bool needs_dx, bool needs_factors) {
  auto layers = layers_of(weight, p, lam, q, dy.size());
  for (size_t i = 0; i < layers.size(); ++i)
    if (dy[i]) layers[i].rows.emplace(*dy[i]);
  const Weights weights(weight.begin(), weight.end());
  const auto [dx, gradients] =
      backward(x, weights, layers, {scaling, tangent, dropout, seed}, h, needs_dx, needs_factors);
  return {dx, gradients.dp, gradients.dlam, gradients.dq};
}

}  // namespace hal
