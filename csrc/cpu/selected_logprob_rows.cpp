// selected_logprob from logits that a library GEMM has written: one thread a row, passes over a
// row that the first of them brought into cache.
#include <tuple>

#include "logprob_row.h"
#include "operators.h"

namespace sepo {
namespace {

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
      NothingMore<T> nothing;
      const T top = finish(at + m * stride, V, m);
      const Row r = do_row<T, To>(at + m * stride, row, V, top, target[m], finish, nothing);
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
