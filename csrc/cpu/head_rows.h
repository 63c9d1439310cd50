// One row of logits that a library GEMM has written, finished in place: scale, bias, soft cap.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>

#include <cmath>
#include <limits>
#include <optional>

namespace sepo {

constexpr int64_t SUM_BLOCK = 512;  // entries of a row that are summed in the logits' own type

template <typename T>
using VecOf = at::vec::Vectorized<T>;

template <typename T>
struct Finish {
  at::Tensor bias;  // (V,) of type T, or undefined
  T scale;
  std::optional<T> softcap;
  at::Tensor scales;  // (M,) of type T, in the place of scale, or undefined

  Finish(const std::optional<at::Tensor>& bias, double scale, std::optional<double> softcap,
         const std::optional<at::Tensor>& scales)
      : bias(bias ? bias->to(c10::CppTypeToScalarType<T>::value).contiguous() : at::Tensor()),
        scale(static_cast<T>(scale)),
        softcap(softcap ? std::optional<T>(*softcap) : std::nullopt),
        scales(scales ? scales->contiguous() : at::Tensor()) {}

  T scale_at(int64_t m) const { return scales.defined() ? scales.const_data_ptr<T>()[m] : scale; }

  // the cap's derivative at a finished logit
  T derivative(T y) const { return softcap ? T(1) - (y / *softcap) * (y / *softcap) : T(1); }
  VecOf<T> derivative(VecOf<T> y) const {
    const VecOf<T> relative = y / VecOf<T>(*softcap);
    return VecOf<T>(T(1)) - relative * relative;
  }

  // Finishes row m of logits in place; returns the largest, or NaN if there is one
  T operator()(T* z, int64_t V, int64_t m) const {
    const T scale = scale_at(m);
    const bool plain = scale == T(1) && !bias.defined() && !softcap;
    const T* offset = bias.defined() ? bias.const_data_ptr<T>() : nullptr;
    const VecOf<T> factor(scale), cap(softcap.value_or(T(1)));
    constexpr T lowest = -std::numeric_limits<T>::infinity();
    VecOf<T> top(lowest);
    for (int64_t v = 0; v < V; v += VecOf<T>::size()) {
      const int64_t width = std::min<int64_t>(VecOf<T>::size(), V - v);
      VecOf<T> y = VecOf<T>::loadu(z + v, width);
      if (!plain) {
        y = y * factor;
        if (offset) y = y + VecOf<T>::loadu(offset + v, width);
        if (softcap) y = cap * (y / cap).tanh();
        y.store(z + v, width);
      }
      // lanes beyond V must not be part of the maximum
      top = at::vec::maximum(top, VecOf<T>::set(VecOf<T>(lowest), y, width));
    }
    return at::vec::vec_reduce_all<T>(
        [](VecOf<T>& a, VecOf<T>& b) { return at::vec::maximum(a, b); }, top);
  }
};

template <typename T>
T sum_lanes(VecOf<T> values) {
  return at::vec::vec_reduce_all<T>([](VecOf<T>& a, VecOf<T>& b) { return a + b; }, values);
}

// values with the lanes from `width` on set to zero
template <typename T>
VecOf<T> only(VecOf<T> values, int64_t width) {
  return VecOf<T>::set(VecOf<T>(T(0)), values, width);
}

}  // namespace sepo
