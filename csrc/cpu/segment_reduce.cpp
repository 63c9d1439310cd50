// Sums over segments on the CPU: each segment alone, in a fixed order, without atomics.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "operators.h"

namespace sepo {
namespace {

constexpr int64_t GRAIN = 1 << 15;  // values a thread takes at least

void check(
    const at::Tensor& cu_rows,  // (S + 1,) int32 contiguous
    int64_t M) {
  TORCH_CHECK_VALUE(
      cu_rows.dim() == 1 && cu_rows.numel() > 0 && cu_rows.scalar_type() == at::kInt &&
          cu_rows.is_contiguous(),
      "expected contiguous int32 cu_rows (S + 1,), got ", cu_rows.scalar_type(), " ",
      cu_rows.sizes());
  const int32_t* cu = cu_rows.const_data_ptr<int32_t>();
  const int64_t S = cu_rows.numel() - 1;
  TORCH_CHECK_VALUE(cu[0] == 0 && cu[S] == M && std::is_sorted(cu, cu + S + 1),
                    "expected cu_rows that rises from 0 to ", M, ", got ", cu[0], " to ", cu[S]);
}

// In double, whatever comes in: one float to add 70 000 values to would lose four digits of the sum
template <typename T>
double sum_of(const T* values, int64_t count) {
  constexpr int64_t LANES = 16;  // for the compiler to vectorise: each has an order of its own
  double lanes[LANES] = {}, total = 0;
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    for (int64_t lane = 0; lane < LANES; ++lane) lanes[lane] += values[i + lane];
  for (; i < count; ++i) total += values[i];
  for (const double lane : lanes) total += lane;
  return total;
}

template <typename Body>  // void(segment, start, stop)
void for_each_segment(const at::Tensor& cu_rows, const Body& body) {
  const int32_t* cu = cu_rows.const_data_ptr<int32_t>();
  const int64_t S = cu_rows.numel() - 1;
  const int64_t mean = std::max<int64_t>(1, cu[S] / std::max<int64_t>(1, S));
  at::parallel_for(0, S, std::max<int64_t>(1, GRAIN / mean), [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) body(s, cu[s], cu[s + 1]);
  });
}

}  // namespace

at::Tensor segment_sum(  // (S,)
    const at::Tensor& values,  // (M,) float32 or float64, contiguous
    const at::Tensor& cu_rows  // (S + 1,) int32 contiguous, from 0 to M
) {
  TORCH_CHECK_VALUE(values.dim() == 1 && values.is_contiguous(),
                    "expected contiguous values (M,), got ", values.sizes());
  check(cu_rows, values.numel());
  at::Tensor sum = values.new_empty({cu_rows.numel() - 1});
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "native_segment_sum", [&] {
    const scalar_t* in = values.const_data_ptr<scalar_t>();
    scalar_t* out = sum.mutable_data_ptr<scalar_t>();
    for_each_segment(cu_rows, [&](int64_t s, int64_t start, int64_t stop) {
      out[s] = static_cast<scalar_t>(sum_of(in + start, stop - start));
    });
  });
  return sum;
}

at::Tensor segment_sum_bwd(  // (M,)
    const at::Tensor& grad_sum,  // (S,) float32 or float64, contiguous
    const at::Tensor& cu_rows,   // (S + 1,) int32 contiguous, from 0 to M
    int64_t M) {
  check(cu_rows, M);
  TORCH_CHECK_VALUE(grad_sum.is_contiguous() && grad_sum.dim() == 1 &&
                        grad_sum.numel() == cu_rows.numel() - 1,
                    "expected contiguous grad_sum (", cu_rows.numel() - 1, ",), got ",
                    grad_sum.sizes());
  at::Tensor grad_values = grad_sum.new_empty({M});
  AT_DISPATCH_FLOATING_TYPES(grad_sum.scalar_type(), "native_segment_sum_bwd", [&] {
    const scalar_t* in = grad_sum.const_data_ptr<scalar_t>();
    scalar_t* out = grad_values.mutable_data_ptr<scalar_t>();
    for_each_segment(cu_rows, [&](int64_t s, int64_t start, int64_t stop) {
      std::fill(out + start, out + stop, in[s]);
    });
  });
  return grad_values;
}

}  // namespace sepo
