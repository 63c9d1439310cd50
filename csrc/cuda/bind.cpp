// The one file that knows both torch and CUDA: outputs are allocated here, on the current stream's
// device, and the launchers do the rest. Checks of values are in csrc/cpu.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../segment_schemas.h"
#include "segment_reduce.h"
#include "segment_topk.h"

namespace {

// Offsets as the kernels read them; their values are on the device, and reading them would wait.
const int32_t* offsets(const at::Tensor& cu, const at::Tensor& data, int64_t size) {
  TORCH_CHECK_VALUE(cu.device() == data.device() && cu.scalar_type() == at::kInt && cu.dim() == 1 &&
                        cu.numel() == size && size > 0 && cu.is_contiguous() &&
                        data.dim() == 1 && data.is_contiguous(),
                    "expected contiguous int32 offsets (", size, ",) on ", data.device(), ", got ",
                    cu.scalar_type(), " ", cu.sizes(), " on ", cu.device());
  return cu.const_data_ptr<int32_t>();
}

int dtype_of(const at::Tensor& score) {
  switch (score.scalar_type()) {
    case at::kDouble: return SEPO_FLOAT64;
    case at::kFloat: return SEPO_FLOAT32;
    case at::kHalf: return SEPO_FLOAT16;
    case at::kBFloat16: return SEPO_BFLOAT16;
    default: TORCH_CHECK_VALUE(false, "expected a floating-point score, got ", score.scalar_type());
  }
}

int is_double(const at::Tensor& values) {
  TORCH_CHECK_VALUE(values.scalar_type() == at::kFloat || values.scalar_type() == at::kDouble,
                    "expected float32 or float64 values, got ", values.scalar_type());
  return values.scalar_type() == at::kDouble;
}

at::Tensor segment_topk(const at::Tensor& score, const at::Tensor& cu_tokens,
                        const at::Tensor& cu_rows, int64_t side, int64_t M) {
  const c10::cuda::CUDAGuard guard(score.device());
  const int64_t size = cu_tokens.numel();
  const int32_t* tokens = offsets(cu_tokens, score, size);
  const int32_t* rows = offsets(cu_rows, score, size);
  at::Tensor index = at::empty({M}, cu_rows.options());
  C10_CUDA_CHECK(sepo_segment_topk(score.const_data_ptr(), dtype_of(score), tokens, rows,
                                   index.mutable_data_ptr<int32_t>(), score.numel(), size - 1,
                                   static_cast<int>(side), c10::cuda::getCurrentCUDAStream()));
  return index;
}

at::Tensor segment_sum(const at::Tensor& values, const at::Tensor& cu_rows) {
  const c10::cuda::CUDAGuard guard(values.device());
  const int64_t size = cu_rows.numel();
  const int32_t* rows = offsets(cu_rows, values, size);
  at::Tensor sum = at::empty({size - 1}, values.options());
  C10_CUDA_CHECK(sepo_segment_sum(values.const_data_ptr(), is_double(values), rows,
                                  sum.mutable_data_ptr(), size - 1,
                                  c10::cuda::getCurrentCUDAStream()));
  return sum;
}

at::Tensor segment_sum_bwd(const at::Tensor& grad_sum, const at::Tensor& cu_rows, int64_t M) {
  const c10::cuda::CUDAGuard guard(grad_sum.device());
  const int64_t S = grad_sum.numel();
  const int32_t* rows = offsets(cu_rows, grad_sum, S + 1);
  at::Tensor grad_values = at::empty({M}, grad_sum.options());
  C10_CUDA_CHECK(sepo_segment_sum_bwd(grad_sum.const_data_ptr(), is_double(grad_sum), rows,
                                      grad_values.mutable_data_ptr(), S,
                                      c10::cuda::getCurrentCUDAStream()));
  return grad_values;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sepo, m) { sepo::define_segment_operators(m); }

TORCH_LIBRARY_IMPL(sepo, CUDA, m) {
  m.impl("native_segment_topk", &segment_topk);
  m.impl("native_segment_sum", &segment_sum);
  m.impl("native_segment_sum_bwd", &segment_sum_bwd);
}
