// out = y + s·(h⊙Λ)Q: the adapter behind any base layer, in one pass over x and y.

#include "adapter.h"
#include "operators.h"

namespace hal {

namespace {

std::vector<Layer> checked(const Rows& y, const Rows& x, const Factors& factors) {
  const bool fits = y.count == x.count && factors.fit(x.width, y.width) &&
                    y.tensor.scalar_type() == x.tensor.scalar_type();
  if (!fits) throw std::runtime_error("hal::svd_adapter_add: shapes or dtypes do not fit together");
  return {{factors, y}};
}

}  // namespace

std::tuple<Tensor, Tensor> svd_adapter_add(const Tensor& y, const Tensor& x, const Tensor& p,
                                           const Tensor& lam, const Tensor& q, double scaling,
                                           double dropout, const std::optional<Tensor>& seed,
                                           double tangent) {
  const Rows rows(x);
  const auto layers = checked(Rows(y), rows, {p, lam, q});
  const Tensor out = empty_as(y);
  const Tensor h = empty({rows.count, p.size(0)}, accumulated(y.scalar_type()));
  adapter_forward(rows, layers, {scaling, tangent, dropout, seed}, {out}, h);
  return {out, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> svd_adapter_add_backward(
    const Tensor& dout, const Tensor& x, const Tensor& h, const Tensor& p, const Tensor& lam,
    const Tensor& q, double scaling, double dropout, const std::optional<Tensor>& seed,
    double tangent, bool needs_dx, bool needs_factors) {
  const Rows rows(x);
  const auto layers = checked(Rows(dout), rows, {p, lam, q});
  check_h(h, rows, layers);
  const Tensor dx = needs_dx ? empty_as(x) : empty({0}, x.scalar_type());
  const auto [dp, dlam, dq] = adapter_backward(rows, layers, {scaling, tangent, dropout, seed}, h,
                                               needs_dx ? &dx : nullptr, needs_factors);
  return {dx, dp, dlam, dq[0]};
}

}  // namespace hal
