#include "adapter.h"

namespace hal {

namespace {

constexpr int64_t ROWS = 8;  // of a block: what a pass reads once stays in cache for the next

// The dropout mask: a function of the seed, the row and the column alone.
template <class A>
class Dropout {
 public:
  explicit Dropout(const Options& options) : on_(options.seed != nullptr) {
    if (!on_) return;
    seed_ = static_cast<uint64_t>(*data<int64_t>(*options.seed));
    threshold_ = static_cast<uint32_t>(options.dropout * 4294967296.0);
    scale_ = static_cast<A>(1.0 / (1.0 - options.dropout));
  }

  bool on() const { return on_; }

  void apply(A* rows, int64_t first, int64_t n, int64_t d) const {
    for (int64_t i = 0; on_ && i < n; ++i)
      kernels<A>().drop(rows + i * d, d, seed_, first + i, threshold_, scale_);
  }

 private:
  bool on_;
  uint64_t seed_ = 0;
  uint32_t threshold_ = 0;
  A scale_ = 1;
};

// Blocks of rows in type A, and the distance between the rows: in place where nothing is to be done
// to them, null where there are none. A single row stands for all.
template <class S, class A>
class Reader {
 public:
  explicit Reader(const std::optional<Rows>& rows) : rows_(rows ? &*rows : nullptr) {}
  Reader(const Rows& rows, const Dropout<A>& dropout)
      : rows_(&rows), dropout_(dropout.on() ? &dropout : nullptr) {}

  std::pair<const A*, int64_t> read(int64_t first, int64_t n) {
    if (rows_ == nullptr) return {nullptr, 0};
    const bool single = rows_->count == 1;
    const int64_t width = rows_->width;
    if (single && block_ != nullptr) return {block_.get(), 0};
    const S* const from = data<S>(rows_->tensor) + (single ? 0 : first * rows_->stride);
    if constexpr (std::is_same_v<S, A>)
      if (dropout_ == nullptr) return {from, single ? 0 : rows_->stride};
    if (single) n = 1;
    if (block_ == nullptr) block_ = scratch<A>((single ? 1 : ROWS) * width);
    for (int64_t i = 0; i < n; ++i)
      convert(from + i * rows_->stride, block_.get() + i * width, width);
    if (dropout_ != nullptr) dropout_->apply(block_.get(), first, n, width);
    return {block_.get(), single ? 0 : width};
  }

 private:
  const Rows* rows_;
  const Dropout<A>* dropout_ = nullptr;
  std::unique_ptr<A[]> block_;
};

// Where a block of rows of a dense tensor is made: in place, or aside to be narrowed by `write`.
template <class S, class A>
class Writer {
 public:
  Writer(const Tensor& t, int64_t width) : to_(mutable_data<S>(t)), width_(width) {
    if (!std::is_same_v<S, A>) block_ = scratch<A>(ROWS * width);
  }

  A* rows(int64_t first) {
    if constexpr (std::is_same_v<S, A>)
      return to_ + first * width_;
    else
      return block_.get();
  }

  void write(int64_t first, int64_t n) {
    if constexpr (!std::is_same_v<S, A>) convert(block_.get(), to_ + first * width_, n * width_);
  }

 private:
  S* to_;
  int64_t width_;
  std::unique_ptr<A[]> block_;
};

// f(part, first row, end) for `count` parts of the rows, in parallel; parts begin where blocks do.
template <class F>
void for_parts(int64_t rows, int64_t count, F&& f) {
  const int64_t blocks = (rows + ROWS - 1) / ROWS;
  parallel(count, [&](int64_t part) {
    const int64_t begin = blocks * part / count * ROWS;
    f(part, begin, std::min(blocks * (part + 1) / count * ROWS, rows));
  });
}

// Adds the n sums of every other part to the first part's.
template <class A>
void add_parts(A* sums, int64_t count, int64_t n) {
  for (int64_t part = 1; part < count; ++part)
    for (int64_t j = 0; j < n; ++j) sums[j] += sums[part * n + j];
}

// s·Λ
template <class A>
std::unique_ptr<A[]> scaled(const Tensor& lam, double scaling) {
  const Values<A> values(lam);
  const int64_t r = lam.numel();
  auto out = scratch<A>(r);
  for (int64_t k = 0; k < r; ++k) out[k] = values.get()[k] * static_cast<A>(scaling);
  return out;
}

// What weighs the directions in dP and dQ: s·Λ, or c of the tangent gradients.
template <class A>
std::unique_ptr<A[]> gradient_weights(const Tensor& lam, const Options& options) {
  if (options.tangent == 0.0) return scaled<A>(lam, options.scaling);
  auto out = scratch<A>(lam.numel());
  std::fill_n(out.get(), lam.numel(), static_cast<A>(options.tangent));
  return out;
}

// c[i, k] = h[i, k]·l[k], the rows of h at distance sh
template <class A>
void times(const A* h, int64_t sh, const A* l, A* c, int64_t n, int64_t r) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < r; ++k) c[i * r + k] = h[i * sh + k] * l[k];
}

// dlam[k] += Σ h[i, k]·u[i, k]
template <class A>
void add_products(const A* h, int64_t sh, const A* u, A* dlam, int64_t n, int64_t r) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < r; ++k) dlam[k] += h[i * sh + k] * u[i * r + k];
}

template <class A>
void assign_dlam(const Tensor& to, int64_t first, A* dlam, int64_t r, double scaling) {
  for (int64_t k = 0; k < r; ++k) dlam[k] *= static_cast<A>(scaling);
  assign(to, dlam, r, first);
}

// ---- high ranks: torch multiplies ----

// 16-bit rows are not sent there: their sums would be rounded on the way.
bool is_wide(const Rows& x, const Factors& factors, const Options& options) {
  const ScalarType dtype = x.tensor.scalar_type();
  return factors.rank() > HIGHEST_FUSED && dtype == accumulated(dtype) && options.seed == nullptr;
}

// The product of a and b, to the rows of `out` from its element `first` on.
template <class A>
void product_into(const Tensor& out, int64_t first, const Tensor& a, const Tensor& b) {
  const int64_t rows = a.size(0), columns = b.size(1);
  if (out.scalar_type() == type_of<A>()) {
    multiply(view2d(out, rows, columns, columns, 1, first), a, b);
  } else {
    const Tensor made = empty({rows, columns}, type_of<A>());
    multiply(made, a, b);
    assign(out, data<A>(made), rows * columns, first);
  }
}

template <class A>
void wide_forward(const Rows& x, const Layer& layer, const Options& options, int64_t first,
                  const Tensor& y, const Tensor& h) {
  const Values<A> p(layer.factors.p), q(layer.factors.q);
  const int64_t r = layer.factors.rank(), d_out = y.size(y.dim() - 1), sh = h.size(1);
  multiply(view2d(h, x.count, r, sh, 1, first), x.matrix(), transposed(p.tensor()));
  const Tensor c = empty({x.count, r}, h.scalar_type());
  const auto l = scaled<A>(layer.factors.lam, options.scaling);
  const A* const hs = data<A>(h) + first;
  A* const cs = mutable_data<A>(c);
  for_parts(x.count, parts(x.count, r), [&](int64_t, int64_t begin, int64_t end) {
    times(hs + begin * sh, sh, l.get(), cs + begin * r, end - begin, r);
  });
  const Tensor out = view2d(y, x.count, d_out, d_out);
  if (layer.rows)
    multiply_add(out, layer.rows->matrix(), c, q.tensor());
  else
    multiply(out, c, q.tensor());
}

// Adds to dx where `add` is set, else overwrites it; dx may be null, and so may `gradients`.
template <class A>
void wide_backward(const Rows& x, const Layer& layer, const Options& options, size_t index,
                   int64_t first, const A* h, int64_t sh, const Tensor* dx, bool add,
                   const FactorGradients* gradients) {
  const Values<A> p(layer.factors.p), q(layer.factors.q);
  const Tensor dy = layer.rows->matrix();
  const int64_t r = layer.factors.rank(), d_in = x.width;
  const ScalarType dtype = x.tensor.scalar_type();
  const Tensor u = empty({x.count, r}, dtype), c = empty({x.count, r}, dtype);
  multiply(u, dy, transposed(q.tensor()));
  A *const us = mutable_data<A>(u), *const cs = mutable_data<A>(c);
  const auto weighted = [&](const A* from, int64_t stride, const A* weights, A* to) {
    for_parts(x.count, parts(x.count, r), [&](int64_t, int64_t begin, int64_t end) {
      times(from + begin * stride, stride, weights, to + begin * r, end - begin, r);
    });
  };
  if (gradients != nullptr && options.tangent == 0.0) {
    const int64_t count = parts(x.count, r);
    const auto dlam = scratch<A>(count * r);
    for_parts(x.count, count, [&](int64_t part, int64_t begin, int64_t end) {
      std::fill_n(dlam.get() + part * r, r, A(0));
      add_products(h + first + begin * sh, sh, us + begin * r, dlam.get() + part * r, end - begin,
                   r);
    });
    add_parts(dlam.get(), count, r);
    assign_dlam(gradients->dlam, first, dlam.get(), r, options.scaling);
  }
  if (dx != nullptr) {
    weighted(us, r, scaled<A>(layer.factors.lam, options.scaling).get(), cs);
    const Tensor out = view2d(*dx, x.count, d_in, d_in);
    if (add)
      multiply_add(out, out, c, p.tensor());
    else
      multiply(out, c, p.tensor());
  }
  if (gradients == nullptr) return;
  const auto weights = gradient_weights<A>(layer.factors.lam, options);
  weighted(us, r, weights.get(), us);
  product_into<A>(gradients->dp, first * d_in, transposed(u), x.matrix());
  weighted(h + first, sh, weights.get(), cs);
  product_into<A>(gradients->dq[index], 0, transposed(c), dy);
}

// ---- all others: one pass over the rows, for all layers together ----

template <class A>
struct Fused {
  const Layer& layer;
  size_t index;
  int64_t first, rank, d_out;  // its columns of h begin at `first`
  Values<A> p, q;
  std::unique_ptr<A[]> l;  // s·Λ
  std::unique_ptr<A[]> g;  // what weighs the directions in dP and dQ: s·Λ again, or c
};

// f(layer, its index, where its columns of h begin)
template <class F>
void for_layers(const std::vector<Layer>& layers, F&& f) {
  int64_t first = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    f(layers[i], i, first);
    first += layers[i].factors.rank();
  }
}

template <class A>
std::vector<Fused<A>> fused_layers(const Rows& x, const std::vector<Layer>& layers,
                                   const Options& options) {
  std::vector<Fused<A>> fused;
  for_layers(layers, [&](const Layer& layer, size_t index, int64_t first) {
    const auto& [p, lam, q] = layer.factors;
    if (!is_wide(x, layer.factors, options))
      fused.push_back({layer, index, first, p.size(0), q.size(1), Values<A>(p), Values<A>(q),
                       scaled<A>(lam, options.scaling), gradient_weights<A>(lam, options)});
  });
  return fused;
}

// (multiply-adds for each row in one direction, the highest rank)
template <class A>
std::pair<int64_t, int64_t> extent(const std::vector<Fused<A>>& fused, int64_t d_in) {
  int64_t work = 0, highest = 0;
  for (const Fused<A>& own : fused) {
    work += own.rank * (d_in + own.d_out);
    highest = std::max(highest, own.rank);
  }
  return {work, highest};
}

template <class S, class A>
void fused_forward(const Rows& x, const std::vector<Fused<A>>& fused, const Options& options,
                   const std::vector<Tensor>& y, const Tensor& h) {
  const Dropout<A> dropout(options);
  const Kernels<A>& kernel = kernels<A>();
  A* const h_rows = mutable_data<A>(h);
  const int64_t d_in = x.width, sh = h.size(1);
  const auto extents = extent(fused, d_in);

  for_parts(x.count, parts(x.count, extents.first), [&](int64_t, int64_t begin, int64_t end) {
    Reader<S, A> inputs(x, dropout);
    std::vector<Reader<S, A>> bases;
    std::vector<Writer<S, A>> outputs;
    for (const Fused<A>& own : fused) {
      bases.emplace_back(own.layer.rows);
      outputs.emplace_back(y[own.index], own.d_out);
    }
    const auto c = scratch<A>(ROWS * extents.second);
    for (int64_t i = begin; i < end; i += ROWS) {
      const int64_t n = std::min(ROWS, end - i);
      const auto [rows, stride] = inputs.read(i, n);
      for (size_t e = 0; e < fused.size(); ++e) {
        const Fused<A>& own = fused[e];
        A* const hs = h_rows + i * sh + own.first;
        kernel.shrink(rows, stride, own.p.get(), hs, sh, n, own.rank, d_in);
        times(hs, sh, own.l.get(), c.get(), n, own.rank);
        const auto [base, base_stride] = bases[e].read(i, n);
        kernel.expand(c.get(), own.q.get(), base, base_stride, outputs[e].rows(i), own.d_out, n,
                      own.rank, own.d_out);
        outputs[e].write(i, n);
      }
    }
  });
}

// dx may be null, and so may `gradients`.
template <class S, class A>
void fused_backward(const Rows& x, const std::vector<Fused<A>>& fused, const Options& options,
                    const A* h, int64_t sh, const Tensor* dx, const FactorGradients* gradients) {
  const Dropout<A> dropout(options);
  const Kernels<A>& kernel = kernels<A>();
  const int64_t d_in = x.width;
  const auto extents = extent(fused, d_in);
  const int64_t count = parts(x.count, 2 * extents.first);
  // Each part has sums of its own, added in order at the end: for each layer dP, dQ, dΛ.
  std::vector<int64_t> at = {0};
  for (const Fused<A>& own : fused)
    at.push_back(at.back() + (gradients == nullptr ? 0 : own.rank * (d_in + own.d_out + 1)));
  const int64_t total = at.back();
  const auto sums = scratch<A>(count * total);

  for_parts(x.count, count, [&](int64_t part, int64_t begin, int64_t end) {
    A* const own_sums = sums.get() + part * total;
    std::fill_n(own_sums, total, A(0));
    Reader<S, A> inputs(x, dropout);
    std::vector<Reader<S, A>> upstream;
    for (const Fused<A>& own : fused) upstream.emplace_back(own.layer.rows);
    std::optional<Writer<S, A>> outputs;
    if (dx != nullptr) outputs.emplace(*dx, d_in);
    const auto u = scratch<A>(ROWS * extents.second), c = scratch<A>(ROWS * extents.second);
    for (int64_t i = begin; i < end; i += ROWS) {
      const int64_t n = std::min(ROWS, end - i);
      A* const dx_rows = outputs ? outputs->rows(i) : nullptr;
      const A* dx_base = nullptr;  // the first layer overwrites dx, the others add to it
      for (size_t e = 0; e < fused.size(); ++e) {
        const Fused<A>& own = fused[e];
        const auto [dy, dy_stride] = upstream[e].read(i, n);
        if (dy == nullptr) continue;
        const int64_t r = own.rank, d_out = own.d_out;
        A *const dp = own_sums + at[e], *const dq = dp + r * d_in, *const dlam = dq + r * d_out;
        kernel.shrink(dy, dy_stride, own.q.get(), u.get(), r, n, r, d_out);
        if (gradients != nullptr) {
          const A* const hs = h + i * sh + own.first;
          if (options.tangent == 0.0) add_products(hs, sh, u.get(), dlam, n, r);
          times(hs, sh, own.g.get(), c.get(), n, r);
          kernel.outer(c.get(), dy, dy_stride, dq, n, r, d_out);
        }
        if (dx_rows != nullptr) {
          times(u.get(), r, own.l.get(), c.get(), n, r);
          kernel.expand(c.get(), own.p.get(), dx_base, d_in, dx_rows, d_in, n, r, d_in);
          dx_base = dx_rows;
        }
        if (gradients != nullptr) {
          const auto [rows, stride] = inputs.read(i, n);
          times(u.get(), r, own.g.get(), u.get(), n, r);
          kernel.outer(u.get(), rows, stride, dp, n, r, d_in);
        }
      }
      if (dx_base != nullptr) {
        dropout.apply(dx_rows, i, n, d_in);
        outputs->write(i, n);
      }
    }
  });

  if (gradients == nullptr) return;
  add_parts(sums.get(), count, total);
  for (size_t e = 0; e < fused.size(); ++e) {
    const Fused<A>& own = fused[e];
    const int64_t r = own.rank;
    A *const dp = sums.get() + at[e], *const dq = dp + r * d_in, *const dlam = dq + r * own.d_out;
    assign(gradients->dp, dp, r * d_in, own.first * d_in);
    assign(gradients->dq[own.index], dq, r * own.d_out);
    if (options.tangent == 0.0)
      assign_dlam(gradients->dlam, own.first, dlam, r, options.scaling);
  }
}

FactorGradients empty_gradients(const std::vector<Layer>& layers, int64_t rank, int64_t d_in,
                                const Options& options, bool wanted) {
  const auto made = [&](const Tensor& like, std::initializer_list<int64_t> sizes) {
    return wanted ? empty(sizes, like.scalar_type()) : empty({0}, like.scalar_type());
  };
  const Factors& leading = layers.at(0).factors;
  FactorGradients gradients = {made(leading.p, {rank, d_in}), made(leading.lam, {options.tangent == 0.0 ? rank : 0}), {}};
  for (const Layer& layer : layers) {
    const Tensor& q = layer.factors.q;
    gradients.dq.push_back(made(q, {q.size(0), q.size(1)}));
  }
  return gradients;
}

}  // namespace

void adapter_forward(const Rows& x, const std::vector<Layer>& layers, const Options& options,
                     const std::vector<Tensor>& y, const Tensor& h) {
  with_type(x.tensor.scalar_type(), [&](auto s) {
    using S = decltype(s);
    using A = Accumulated<S>;
    const auto fused = fused_layers<A>(x, layers, options);
    if (!fused.empty()) fused_forward<S>(x, fused, options, y, h);
    for_layers(layers, [&](const Layer& layer, size_t index, int64_t first) {
      if (is_wide(x, layer.factors, options))
        wide_forward<A>(x, layer, options, first, y[index], h);
    });
  });
}

FactorGradients adapter_backward(const Rows& x, const std::vector<Layer>& layers,
                                 const Options& options, const Tensor& h_tensor, const Tensor* dx,
                                 bool needs_factors) {
  const int64_t sh = h_tensor.size(1);
  const FactorGradients gradients = empty_gradients(layers, sh, x.width, options, needs_factors);
  const FactorGradients* const wanted = needs_factors ? &gradients : nullptr;
  const bool complete = std::all_of(layers.begin(), layers.end(),
                                    [](const Layer& layer) { return layer.rows.has_value(); });
  if (!complete) {  // layers without dy are passed over below
    torch::stable::fill_(gradients.dp, 0.0);
    torch::stable::fill_(gradients.dlam, 0.0);
    for (const Tensor& dq : gradients.dq) torch::stable::fill_(dq, 0.0);
    if (dx != nullptr) torch::stable::fill_(*dx, 0.0);
  }
  with_type(x.tensor.scalar_type(), [&](auto s) {
    using S = decltype(s);
    using A = Accumulated<S>;
    const Values<A> h(h_tensor);
    const auto fused = fused_layers<A>(x, layers, options);
    bool add = false;  // whether dx holds a layer's part already
    if (!fused.empty()) {
      fused_backward<S>(x, fused, options, h.get(), sh, dx, wanted);
      for (const Fused<A>& own : fused) add = add || own.layer.rows;
    }
    for_layers(layers, [&](const Layer& layer, size_t index, int64_t first) {
      if (!layer.rows || !is_wide(x, layer.factors, options)) return;
      wide_backward<A>(x, layer, options, index, first, h.get(), sh, dx, add, wanted);
      add = true;
    });
  });
  return gradients;
}

}  // namespace hal
