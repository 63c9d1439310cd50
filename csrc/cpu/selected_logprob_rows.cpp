// selected_logprob from logits that a library GEMM has written: one thread a row, passes over a
// row that the first of them brought into cache.
#include <tuple>

#include "head_rows.h"
#include "operators.h"

namespace sepo {
namespace {

// Sums exp(z - c); overwrites z with exp(z - c) * cap'(z) if WRITE_DLOGITS
template <typename T, bool WRITE_DLOGITS>
double exponentials(T* z, int64_t V, T c, const Finish<T>& finish) {
  const VecOf<T> reference(c);
  double total = 0;  // of blocks: the fewer lanes a vector has, the longer the sum in each
  for (int64_t start = 0; start < V; start += SUM_BLOCK) {
    VecOf<T> sum(T(0));
    for (int64_t v = start; v < std::min(V, start + SUM_BLOCK); v += VecOf<T>::size()) {
      const int64_t width = std::min<int64_t>(VecOf<T>::size(), V - v);
      const VecOf<T> y = VecOf<T>::loadu(z + v, width);
      VecOf<T> e = (y - reference).exp();
      sum = sum + only(e, width);
      if constexpr (WRITE_DLOGITS) {
        if (finish.softcap) e = e * finish.derivative(y);
        e.store(z + v, width);
      }
    }
    total += sum_lanes(sum);
  }
  return total;
}

struct Row {
  double logp, lse, row_scale;
};

// Computes row m from z (V,), before scale, bias and cap, overwritten; dlogits (V,) or null, or z
template <typename T, typename To>
Row do_row(T* z, To* dlogits, int64_t V, int64_t m, int64_t target, const Finish<T>& finish) {
  const T top = finish(z, V, m), at_target = z[target], distance = at_target - top;
  z[target] = -std::numeric_limits<T>::infinity();  // summed apart: see logp below
  const T tail = dlogits ? exponentials<T, true>(z, V, top, finish)
                       : exponentials<T, false>(z, V, top, finish);
  const T sum = tail + std::exp(distance);
  // log1p keeps the relative precision of a row that is sure of its target
  const T logp = distance == T(0) ? -std::log1p(tail) : distance - std::log(sum);
  T row_scale(1);
  if (dlogits) {
    const T entry = -tail * finish.derivative(at_target);
    if (static_cast<void*>(dlogits) == static_cast<void*>(z)) {
      z[target] = entry;
      row_scale = T(1) / sum;
    } else if constexpr (!std::is_same_v<T, To>) {
      const VecOf<T> factor(T(1) / sum);
      z[target] = entry;
      at::vec::map([factor](VecOf<T> e) { return e * factor; }, dlogits, z, V);
    }
  }
  return {logp, at_target - logp, row_scale};
}

template <typename T, typename To>
void do_rows(
    const at::Tensor& z, const std::optional<at::Tensor>& bias, const at::Tensor& targets, double scale,
    std::optional<double> softcap, const std::optional<at::Tensor>& dlogits,
    const std::optional<at::Tensor>& scales, at::Tensor& logp, at::Tensor& lse,
    at::Tensor& row_scale) {
  const int64_t V = z.size(1), stride = z.stride(0);
  const int64_t dlogits_stride = dlogits ? dlogits->stride(0) : 0;
  const Finish<T> finish(bias, scale, softcap, scales);
  T *at = z.mutable_data_ptr<T>(), *out[3] = {
      logp.mutable_data_ptr<T>(), lse.mutable_data_ptr<T>(), row_scale.mutable_data_ptr<T>()};
  To* to = dlogits ? dlogits->mutable_data_ptr<To>() : nullptr;
  const int64_t* target = targets.const_data_ptr<int64_t>();
  at::parallel_for(0, z.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      To* row = to ? to + m * dlogits_stride : nullptr;
      const Row r = do_row<T, To>(at + m * stride, row, V, m, target[m], finish);
      out[0][m] = r.logp, out[1][m] = r.lse, out[2][m] = r.row_scale;
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> logprob_rows(
    const Tensor& z, const Maybe& bias, const Tensor& targets, double scale,
    std::optional<double> softcap, const Maybe& dlogits, const Maybe& scales) {
  const at::Tensor at = targets.contiguous();
  auto logp = z.new_empty({z.size(0)});
  auto lse = z.new_empty({z.size(0)}), row_scale = z.new_empty({z.size(0)});
  const auto to = dlogits ? dlogits->scalar_type() : z.scalar_type();
  const auto call = [&](auto kernel) {
    kernel(z, bias, at, scale, softcap, dlogits, scales, logp, lse, row_scale);
  };
  if (z.scalar_type() == at::kDouble) {
    call(do_rows<double, double>);
  } else if (to == at::kFloat) {
    call(do_rows<float, float>);
  } else if (to == at::kBFloat16) {
    call(do_rows<float, at::BFloat16>);
  } else {
    call(do_rows<float, at::Half>);
  }
  return {logp, lse, row_scale};
}

}  // namespace sepo
