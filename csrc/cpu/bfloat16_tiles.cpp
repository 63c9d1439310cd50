// Tells whether oneDNN multiplies bfloat16 tiles on this CPU, by multiplying one.
#include <ATen/native/CPUBlas.h>

#include <exception>
#include <vector>

#include "operators.h"

namespace sepo {

bool bfloat16_tiles() {
  constexpr int64_t N = 32;
  const std::vector<at::BFloat16> ones(N * N, at::BFloat16(1.f));
  std::vector<float> sum(N * N, 0.f);
  try {
    at::native::cpublas::brgemm(N, N, N, N, N, N, /*add_C=*/false, ones.data(), ones.data(), sum.data());
    at::native::cpublas::brgemm_release();
  } catch (const std::exception&) {  // c10::Error, or oneDNN's own
    return false;
  }
  return sum[0] == N;
}

}  // namespace sepo
