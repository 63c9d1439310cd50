// Sums of target_logits: the head's rows at K targets a row, read where they lie, in float32.
//
// A target outside of [0, V) is absent: its dot product is 0, and it is left out of the sums.
#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "head_rows.h"
#include "operators.h"

namespace sepo {
namespace {

constexpr int64_t GRAIN = 1 << 15;  // numbers that a thread reads at least

template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <typename T>
using VecAcc = VecOf<Acc<T>>;
template <typename T>
constexpr int64_t STEP = 2 * VecAcc<T>::size();  // numbers that are widened at once
template <typename T>
constexpr bool WIDE = std::is_same_v<T, Acc<T>>;

inline int64_t within(int64_t width, int64_t size) { return std::clamp<int64_t>(width, 0, size); }

// STEP numbers, those from `width` on zero
template <typename T>
std::pair<VecAcc<T>, VecAcc<T>> load(const T* from, int64_t width) {
  constexpr int64_t half = VecAcc<T>::size();
  if constexpr (WIDE<T>) {
    if (width <= half) return {VecOf<T>::loadu(from, width), VecOf<T>(T(0))};
    return {VecOf<T>::loadu(from), VecOf<T>::loadu(from + half, within(width - half, half))};
  } else {
    const auto [a, b] = at::vec::convert_to_float<T>(VecOf<T>::loadu(from, within(width, STEP<T>)));
    return {a, b};
  }
}

template <typename T>
void store(std::pair<VecAcc<T>, VecAcc<T>> values, T* to, int64_t width) {
  constexpr int64_t half = VecAcc<T>::size();
  if constexpr (WIDE<T>) {
    values.first.store(to, within(width, half));
    if (width > half) values.second.store(to + half, within(width - half, half));
  } else {
    const auto rounded = at::vec::convert_from_float<T>(values.first, values.second);
    rounded.store(to, within(width, STEP<T>));
  }
}

// a . b; `a` has been widened
template <typename T>
Acc<T> dot(const Acc<T>* a, const T* b, int64_t D) {
  VecAcc<T> sum0(Acc<T>(0)), sum1(Acc<T>(0));
  for (int64_t d = 0; d < D; d += STEP<T>) {
    const auto [a0, a1] = load<Acc<T>>(a + d, D - d);
    const auto [b0, b1] = load<T>(b + d, D - d);
    sum0 = at::vec::fmadd(a0, b0, sum0);
    sum1 = at::vec::fmadd(a1, b1, sum1);
  }
  return sum_lanes<Acc<T>>(sum0 + sum1);
}

// to = factor * from + to, or rounded to another type of `to`
template <typename T, typename To>
void add(To* to, Acc<T> factor, const T* from, int64_t D) {
  const VecAcc<T> f(factor);
  for (int64_t d = 0; d < D; d += STEP<T>) {
    const auto [a, b] = load<T>(from + d, D - d);
    const auto [t0, t1] = load<To>(to + d, D - d);
    store<To>({at::vec::fmadd(f, a, t0), at::vec::fmadd(f, b, t1)}, to + d, D - d);
  }
}

template <typename Body>  // void(auto, the type of the head)
void dispatch(const Tensor& head, const Body& body) {
  switch (head.scalar_type()) {
    case at::kDouble: return body(double());
    case at::kFloat: return body(float());
    case at::kBFloat16: return body(at::BFloat16());
    default: return body(at::Half());
  }
}

int64_t grain(int64_t K, int64_t D) { return std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, K * D)); }

}  // namespace

Tensor target_dots(  // (M, K)
    const Tensor& hidden,  // (N, D)
    const Tensor& weight,  // (V, D)
    const Tensor& rows,    // (M,) int32
    const Tensor& targets  // (M, K)
) {
  const Tensor row = rows.contiguous(), target = targets.contiguous();
  const int64_t M = targets.size(0), K = targets.size(1), V = weight.size(0), D = weight.size(1);
  const auto acc = hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  Tensor out = hidden.new_empty({M, K}, hidden.options().dtype(acc));
  dispatch(weight, [&](auto zero) {
    using T = decltype(zero);
    const T *h = hidden.const_data_ptr<T>(), *w = weight.const_data_ptr<T>();
    const int32_t* at_row = row.const_data_ptr<int32_t>();
    const int64_t* t = target.const_data_ptr<int64_t>();
    Acc<T>* z = out.mutable_data_ptr<Acc<T>>();
    at::parallel_for(0, M, grain(K, D), [&](int64_t begin, int64_t end) {
      std::vector<Acc<T>> x(D);
      for (int64_t m = begin; m < end; ++m) {
        std::copy_n(h + at_row[m] * hidden.stride(0), D, x.begin());
        for (int64_t i = m * K; i < (m + 1) * K; ++i) {
          const bool present = t[i] >= 0 && t[i] < V;
          z[i] = present ? dot<T>(x.data(), w + t[i] * weight.stride(0), D) : Acc<T>(0);
        }
      }
    });
  });
  return out;
}

Tensor target_sums(  // (M, D)
    const Tensor& coefficient,  // (M, K)
    const Tensor& weight,       // (V, D)
    const Tensor& targets       // (M, K)
) {
  const Tensor factor = coefficient.contiguous(), target = targets.contiguous();
  const int64_t M = targets.size(0), K = targets.size(1), V = weight.size(0), D = weight.size(1);
  Tensor out = coefficient.new_empty({M, D});
  dispatch(weight, [&](auto zero) {
    using T = decltype(zero);
    const T* w = weight.const_data_ptr<T>();
    const int64_t* t = target.const_data_ptr<int64_t>();
    const Acc<T>* c = factor.const_data_ptr<Acc<T>>();
    Acc<T>* sum = out.mutable_data_ptr<Acc<T>>();
    at::parallel_for(0, M, grain(K, D), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        std::fill_n(sum + m * D, D, Acc<T>(0));
        for (int64_t i = m * K; i < (m + 1) * K; ++i)
          if (t[i] >= 0 && t[i] < V) add<T>(sum + m * D, c[i], w + t[i] * weight.stride(0), D);
      }
    });
  });
  return out;
}

// A target's terms are one thread's, in the order of `order`; their sum is rounded once.
void target_add(
    Tensor grad_weight,         // (V, D), added to
    const Tensor& coefficient,  // (M, K)
    const Tensor& hidden,       // (N, D)
    const Tensor& rows,         // (M,) int32
    const Tensor& sorted,       // (M K,) the targets in rising order
    const Tensor& order         // (M K,) where they come from
) {
  const Tensor factor = coefficient.contiguous(), row = rows.contiguous();
  const int64_t E = sorted.numel(), K = coefficient.size(1), V = grad_weight.size(0);
  const int64_t D = hidden.size(1);
  dispatch(hidden, [&](auto zero) {
    using T = decltype(zero);
    const T* h = hidden.const_data_ptr<T>();
    T* grad = grad_weight.mutable_data_ptr<T>();
    const int32_t* at_row = row.const_data_ptr<int32_t>();
    const int64_t *t = sorted.const_data_ptr<int64_t>(), *from = order.const_data_ptr<int64_t>();
    const Acc<T>* c = factor.const_data_ptr<Acc<T>>();
    at::parallel_for(0, E, grain(1, D), [&](int64_t begin, int64_t end) {
      std::vector<Acc<T>> sum(D);
      int64_t i = begin;
      while (i > 0 && i < end && t[i] == t[i - 1]) ++i;  // another thread's, who has its first
      while (i < end) {
        const int64_t target = t[i];
        const bool present = target >= 0 && target < V;
        std::fill(sum.begin(), sum.end(), Acc<T>(0));
        for (; i < E && t[i] == target; ++i)
          if (present) add<T>(sum.data(), c[from[i]], h + at_row[from[i] / K] * hidden.stride(0), D);
        if (present) add<Acc<T>>(grad + target * grad_weight.stride(0), Acc<T>(1), sum.data(), D);
      }
    });
  });
}

}  // namespace sepo
