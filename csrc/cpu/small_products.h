// Products of tiles that are in cache, for operands that no library multiplies there: float32, and
// bfloat16 widened on its way into a tile.
#pragma once

#include "vectors.h"

namespace sepo {

// ROWS x 2 vectors of c stay in registers while k goes by
template <int ROWS>
inline void multiply_rows(int64_t k, int64_t n, const float* a, const float* b, float* c, bool add) {
  Vec sum[ROWS][2];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < 2; ++j) sum[i][j] = Vec(0.f);
  for (int64_t l = 0; l < k; ++l) {
    const Vec b0 = Vec::loadu(b + l * n), b1 = Vec::loadu(b + l * n + LANES);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const Vec factor(a[i * k + l]);
      sum[i][0] = at::vec::fmadd(factor, b0, sum[i][0]);
      sum[i][1] = at::vec::fmadd(factor, b1, sum[i][1]);
    }
  }
  // added at the end: k terms at a time round less than one long sum in c
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < 2; ++j) {
      float* at = c + i * n + j * LANES;
      (add ? sum[i][j] + Vec::loadu(at) : sum[i][j]).store(at);
    }
}

// c (m, n) = or += a (m, k) b (k, n), all contiguous; m even, n a multiple of two vectors
inline void multiply(int64_t m, int64_t n, int64_t k, const float* a, const float* b, float* c,
                     bool add) {
  // as many sums as a processor has registers for: 32 with AVX-512, else 16
  constexpr int64_t ROWS = LANES == 16 ? 8 : 6;
  for (int64_t j = 0; j < n; j += 2 * LANES) {
    int64_t i = 0;
    for (; i + ROWS <= m; i += ROWS) multiply_rows<ROWS>(k, n, a + i * k, b + j, c + i * n + j, add);
    for (; i + 4 <= m; i += 4) multiply_rows<4>(k, n, a + i * k, b + j, c + i * n + j, add);
    for (; i < m; i += 2) multiply_rows<2>(k, n, a + i * k, b + j, c + i * n + j, add);
  }
}

}  // namespace sepo
