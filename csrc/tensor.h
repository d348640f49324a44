// What the operators need of tensors: views, memory, element types, threads. Stable ABI only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"

namespace hal {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The type sums over values of type S are kept in.
template <class S>
using Accumulated = std::conditional_t<std::is_same_v<S, double>, double, float>;

inline ScalarType accumulated(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class A>
constexpr ScalarType type_of() {
  return std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
}

// Calls f(S{}) with the storage type S of `dtype`.
template <class F>
auto with_type(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Float16{});
    default:
      throw std::runtime_error(
          "hal: a tensor's dtype is none of float32, float64, bfloat16 and float16");
  }
}

// ---- conversion of n contiguous elements, through float for 16-bit types ----

inline void convert(const BFloat16* from, float* to, int64_t n) {
  conversions().widen_bfloat16(from, to, n);
}
inline void convert(const Float16* from, float* to, int64_t n) {
  conversions().widen_float16(from, to, n);
}
inline void convert(const float* from, BFloat16* to, int64_t n) {
  conversions().narrow_bfloat16(from, to, n);
}
inline void convert(const float* from, Float16* to, int64_t n) {
  conversions().narrow_float16(from, to, n);
}
template <class From, class To>
std::enable_if_t<std::is_floating_point_v<From> && std::is_floating_point_v<To>> convert(
    const From* from, To* to, int64_t n) {
  std::copy(from, from + n, to);
}
// double with 16 bits, by way of float
template <class From, class To>
std::enable_if_t<std::is_same_v<From, double> != std::is_same_v<To, double> &&
                 (sizeof(From) == 2 || sizeof(To) == 2)>
convert(const From* from, To* to, int64_t n) {
  float block[256];
  for (int64_t i = 0; i < n; i += 256) {
    const int64_t m = std::min<int64_t>(256, n - i);
    convert(from + i, block, m);
    convert(block, to + i, m);
  }
}

// ---- memory ----

template <class S>
const S* data(const Tensor& t) {
  return static_cast<const S*>(t.const_data_ptr());
}

template <class S>
S* mutable_data(const Tensor& t) {
  return static_cast<S*>(t.mutable_data_ptr());
}

template <class T>
std::unique_ptr<T[]> scratch(int64_t n) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(n)]);
}

inline Tensor empty(const int64_t* sizes, int64_t dim, ScalarType dtype) {
  std::vector<int64_t> strides(static_cast<size_t>(dim));
  int64_t count = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = count;
    count *= std::max<int64_t>(sizes[i], 1);
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes, strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  Tensor made(handle);
#ifdef HAL_KERNELS_POISON  // what a kernel forgets to write shows as NaN
  if (made.numel() > 0) torch::stable::fill_(made, std::numeric_limits<double>::quiet_NaN());
#endif
  return made;
}

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype);
}

inline Tensor empty_as(const Tensor& t, ScalarType dtype) {
  const auto sizes = t.sizes();
  return empty(sizes.data(), static_cast<int64_t>(sizes.size()), dtype);
}

inline Tensor empty_as(const Tensor& t) { return empty_as(t, t.scalar_type()); }

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// Writes n values of type A to a dense tensor of any floating type, from its element `first` on.
template <class A>
void assign(const Tensor& t, const A* from, int64_t n, int64_t first = 0) {
  with_type(t.scalar_type(),
            [&](auto s) { convert(from, mutable_data<decltype(s)>(t) + first, n); });
}

// A small tensor in type A, dense: itself, or a converted copy.
template <class A>
class Values {
 public:
  explicit Values(const Tensor& t) : tensor_(dense(t)) {
    with_type(tensor_.scalar_type(), [&](auto s) {
      using S = decltype(s);
      if constexpr (!std::is_same_v<S, A>) {
        const Tensor from = tensor_;
        tensor_ = empty_as(from, type_of<A>());
        convert(data<S>(from), mutable_data<A>(tensor_), from.numel());
      }
    });
  }

  const A* get() const { return data<A>(tensor_); }
  const Tensor& tensor() const { return tensor_; }

 private:
  Tensor tensor_;
};

// A dense tensor of type A, in `dtype`.
template <class A>
Tensor in_dtype(const Tensor& t, ScalarType dtype) {
  if (dtype == type_of<A>()) return t;
  const Tensor out = empty_as(t, dtype);
  assign(out, data<A>(t), t.numel());
  return out;
}

// ---- views ----

inline Tensor view2d(const Tensor& t, int64_t rows, int64_t columns, int64_t row_stride,
                     int64_t column_stride = 1, int64_t offset = 0) {
  const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, offset, &handle));
  return Tensor(handle);
}

inline Tensor transposed(const Tensor& t) {
  return view2d(t, t.size(1), t.size(0), t.stride(1), t.stride(0));
}

// [..., d] as T rows at one distance, each row dense: t's own memory where its strides allow that.
struct Rows {
  Tensor tensor;
  int64_t count, width, stride;

  explicit Rows(const Tensor& t) : tensor(t), count(1) {
    const auto sizes = t.sizes(), strides = t.strides();
    const int64_t dim = static_cast<int64_t>(sizes.size());
    if (dim == 0) throw std::runtime_error("hal: a tensor has no dimension, expected [..., d]");
    width = sizes[dim - 1];
    stride = width;
    bool regular = width <= 1 || strides[dim - 1] == 1;
    for (int64_t i = dim - 2; i >= 0; --i) {
      if (sizes[i] != 1) {
        if (count == 1)
          stride = strides[i];
        else
          regular = regular && strides[i] == stride * count;
      }
      count *= sizes[i];
    }
    // BLAS wants rows that do not overlap; stride 0 is what .sum() sends back.
    if (count > 1 && stride < std::max<int64_t>(width, 1)) regular = false;
    if (!regular || count == 0) {
      if (!regular && count > 0) tensor = torch::stable::contiguous(t);
      stride = width;
    }
  }

  Tensor matrix() const { return view2d(tensor, count, width, std::max<int64_t>(stride, 1)); }
};

// ---- products of matrices, by torch ----

// The loops of this library win by passing over memory once. From about this rank on, arithmetic
// takes longer than memory, and a GEMM that packs its operands is faster.
constexpr int64_t HIGHEST_FUSED = 24;

// out = base + a·b; base may be `out` itself, or one row for all.
inline void multiply_add(const Tensor& out, const Tensor& base, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), base.get(), a.get(), b.get(), 1.0, 1.0));
}

// out = a·b
inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// ---- threads ----

template <class F>
void parallel(int64_t count, F&& f) {  // f(i) for each i, spread over torch's threads
  if (count == 1) {
    f(int64_t{0});
    return;
  }
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// Into how many parts to split `count` things of `work` multiply-adds each: one per thread, unless
// a part is too little to wake a thread for. The result depends on nothing but these numbers and
// torch.set_num_threads, so sums made in parts repeat bit for bit.
inline int64_t parts(int64_t count, int64_t work) {
  const int64_t worthwhile = count * std::max<int64_t>(work, 1) / 100000;
  const int64_t most = std::min({int64_t{torch::stable::get_num_threads()}, worthwhile, count});
  return std::max<int64_t>(most, 1);
}

}  // namespace hal
