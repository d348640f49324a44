// The allocator's running averages, in one pass over their memory, and the selection of the
// smallest scores.

#include <cmath>
#include <numeric>

#include "operators.h"

namespace hal {

namespace {

constexpr int64_t BLOCK = 1024;  // elements that are converted at a time

struct Memory {
  void* data;
  ScalarType dtype;
};

// n elements from the i-th on in type A: their own memory, or `block` filled with them.
template <class A>
A* opened(const Memory& memory, int64_t i, int64_t n, A* block) {
  return with_type(memory.dtype, [&](auto s) -> A* {
    using S = decltype(s);
    S* const from = static_cast<S*>(memory.data) + i;
    if constexpr (std::is_same_v<S, A>) {
      return from;
    } else {
      convert(from, block, n);
      return block;
    }
  });
}

// Puts a block back, unless the elements' own memory was open.
template <class A>
void closed(const Memory& memory, int64_t i, int64_t n, const A* block) {
  if (memory.dtype == type_of<A>()) return;
  with_type(memory.dtype,
            [&](auto s) { convert(block, static_cast<decltype(s)*>(memory.data) + i, n); });
}

template <class A>
void update(const Memory& smooth, const Memory& uncertain, const Memory& values,
            const Memory& gradients, int64_t begin, int64_t end, double beta1, double beta2) {
  A blocks[4][BLOCK];
  for (int64_t i = begin; i < end; i += BLOCK) {
    const int64_t n = std::min(BLOCK, end - i);
    A *const s = opened(smooth, i, n, blocks[0]), *const u = opened(uncertain, i, n, blocks[1]);
    kernels<A>().importance(s, u, opened(values, i, n, blocks[2]),
                            opened(gradients, i, n, blocks[3]), n, beta1, beta2);
    closed(smooth, i, n, s);
    closed(uncertain, i, n, u);
  }
}

void update_one(const Tensor& smooth, const Tensor& uncertain, const Tensor& values,
                const Tensor& gradients, double beta1, double beta2) {
  const int64_t total = smooth.numel();
  const ScalarType dtype = smooth.scalar_type();
  if (uncertain.numel() != total || values.numel() != total || gradients.numel() != total ||
      uncertain.scalar_type() != dtype)
    throw std::runtime_error("hal::update_importance_: shapes or dtypes do not fit together");
  const Tensor s = dense(smooth), u = dense(uncertain), v = dense(values), g = dense(gradients);
  const Memory memory[] = {{s.mutable_data_ptr(), dtype},
                           {u.mutable_data_ptr(), dtype},
                           {const_cast<void*>(v.const_data_ptr()), v.scalar_type()},
                           {const_cast<void*>(g.const_data_ptr()), g.scalar_type()}};
  const int64_t n = parts(total, 8);
  parallel(n, [&](int64_t part) {
    const auto run = dtype == ScalarType::Double ? update<double> : update<float>;
    run(memory[0], memory[1], memory[2], memory[3], total * part / n, total * (part + 1) / n, beta1,
        beta2);
  });
  Tensor smooth_out = smooth, uncertain_out = uncertain;
  if (!smooth.is_contiguous()) torch::stable::copy_(smooth_out, s);
  if (!uncertain.is_contiguous()) torch::stable::copy_(uncertain_out, u);
}

}  // namespace

void update_importance_(std::vector<Tensor> importance, std::vector<Tensor> uncertainty,
                        std::vector<Tensor> values, std::vector<Tensor> gradients, double beta1,
                        double beta2) {
  const size_t n = importance.size();
  if (uncertainty.size() != n || values.size() != n || gradients.size() != n)
    throw std::runtime_error("hal::update_importance_: lists of unequal length");
  for (size_t i = 0; i < n; ++i)
    update_one(importance[i], uncertainty[i], values[i], gradients[i], beta1, beta2);
}

Tensor prune_smallest(const Tensor& scores, int64_t count) {
  const int64_t n = scores.numel();
  if (count < 0 || count > n)
    throw std::runtime_error("hal::prune_smallest: count is not between 0 and the scores' number");
  const Values<double> values(scores);  // exact for every floating type
  const double* const v = values.get();
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), int64_t{0});
  // NaN last, ties by index: a strict order, so the first `count` are one definite set.
  const auto before = [v](int64_t a, int64_t b) {
    const bool nan_a = std::isnan(v[a]), nan_b = std::isnan(v[b]);
    if (nan_a != nan_b) return nan_b;
    return nan_a || v[a] == v[b] ? a < b : v[a] < v[b];
  };
  if (count < n) std::nth_element(order.begin(), order.begin() + count, order.end(), before);
  std::vector<double> mask(static_cast<size_t>(n), 1.0);
  for (int64_t i = 0; i < count; ++i) mask[order[i]] = 0.0;
  const Tensor out = empty({n}, scores.scalar_type());
  assign(out, mask.data(), n);
  return out;
}

}  // namespace hal
