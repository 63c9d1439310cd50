// Vector types and widths of the CPU kernels of bfloat16 and float32.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>

namespace sepo {

using Vec = at::vec::Vectorized<float>;
using VecBf16 = at::vec::Vectorized<at::BFloat16>;
constexpr int64_t LANES = Vec::size();

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace sepo
