// GEMMs of tiles that are in cache, for operands that no library multiplies there: float32, and
// bfloat16 widened on its way into a tile.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace sepo {

constexpr int64_t PANEL = 2 * LANES;  // columns that are summed side by side
// as many sums as a processor has registers for: 32 with AVX-512, else 16
constexpr int64_t SUMS = LANES == 16 ? 8 : 6;

// A matrix in a larger one, whose rows are `stride` apart
template <typename T>
struct Matrix {
  T* data;
  int64_t stride;

  Matrix from(int64_t row, int64_t column) const { return {data + row * stride + column, stride}; }
};

// c (ROWS, PANEL) = or += a (ROWS, k) b (k, PANEL): ROWS x 2 vectors stay in registers while k goes by
template <int ROWS>
inline void multiply_rows(int64_t k, Matrix<const float> a, Matrix<const float> b, Matrix<float> c,
                          bool add) {
  Vec sum[ROWS][2];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < 2; ++j) sum[i][j] = Vec(0.f);
  for (int64_t l = 0; l < k; ++l) {
    const float* row = b.data + l * b.stride;
    const Vec b0 = Vec::loadu(row), b1 = Vec::loadu(row + LANES);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const Vec factor(a.data[i * a.stride + l]);
      sum[i][0] = at::vec::fmadd(factor, b0, sum[i][0]);
      sum[i][1] = at::vec::fmadd(factor, b1, sum[i][1]);
    }
  }
  // added at the end: k terms at a time round less than one long sum in c
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < 2; ++j) {
      float* at = c.data + i * c.stride + j * LANES;
      (add ? sum[i][j] + Vec::loadu(at) : sum[i][j]).store(at);
    }
}

// Calls block(first, rows) for blocks of at most SUMS rows of m, which is even; rows is a constant
template <typename Block>
inline void for_row_blocks(int64_t m, const Block& block) {
  int64_t i = 0;
  for (; i + SUMS <= m; i += SUMS) block(i, std::integral_constant<int, SUMS>());
  for (; i + 4 <= m; i += 4) block(i, std::integral_constant<int, 4>());
  for (; i < m; i += 2) block(i, std::integral_constant<int, 2>());
}

}  // namespace sepo
