// Products of bfloat16 numbers whose float32 sums are stored: one, or the two or three that make up
// one of float32 numbers. With hi the nearest bfloat16 and lo the nearest to what is left,
//
//   x W.T = (x_hi + x_lo) (W_hi + W_lo).T, without x_lo W_lo.T
#include <limits>
#include <utility>

#include "logit_tiles.h"
#include "operators.h"

namespace sepo {
namespace {

constexpr int64_t GROUP_BLOCKS = 8;  // of rows, that a task multiplies a tile of the weight with
constexpr int64_t PAIRS = LANES;     // of columns, whose halves are made at once

struct Product {
  at::Tensor weight;  // (V, D) bfloat16
  const PackedRows& rows;
};

// y (N, V) = the sum of the products, + bias
void multiply(const std::vector<Product>& products, const Maybe& bias, Tensor& y) {
  const PackedRows& shape = products[0].rows;
  const int64_t V = y.size(1), ld = y.stride(0), groups = ceil_div(shape.blocks, GROUP_BLOCKS);
  const float* bias_at = bias ? bias->const_data_ptr<float>() : nullptr;
  float* out = y.mutable_data_ptr<float>();
  at::parallel_for(0, ceil_div(V, TILE_V) * groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<WeightTile> weight;
    for (const Product& product : products) weight.emplace_back(product.weight);
    alignas(64) float z[TILE_V * TILE_M];  // (count, TILE_M)
    for (int64_t task = begin; task < end; ++task) {
      const int64_t v0 = task / groups * TILE_V, count = std::min(TILE_V, V - v0);
      const int64_t first = task % groups * GROUP_BLOCKS;
      for (WeightTile& tile : weight) tile.load(v0, count);
      for (int64_t b = first; b < std::min(shape.blocks, first + GROUP_BLOCKS); ++b) {
        for (size_t i = 0; i < products.size(); ++i)
          weight[i].multiply(products[i].rows, b, z, /*add=*/i > 0);
        for (int64_t i = 0; bias_at && i < count * TILE_M; i += LANES)
          (Vec::loadu(z + i) + Vec(bias_at[v0 + i / TILE_M])).store(z + i);
        at::vec::transpose_mxn<float>(
            z, TILE_M, out + b * TILE_M * ld + v0, ld, count, shape.block_rows(b));
      }
    }
    at::native::cpublas::brgemm_release();
  });
}

// As sepo_kernels/halves.py: hi is finite, what is not is in lo
std::pair<VecBf16, VecBf16> halves(Vec first, Vec second) {
  const Vec most(std::numeric_limits<at::BFloat16>::max()), least = Vec(0.f) - most;
  const VecBf16 hi = at::vec::convert_float_bfloat16(
      at::vec::clamp(first, least, most), at::vec::clamp(second, least, most));
  const auto [first_hi, second_hi] = at::vec::convert_bfloat16_float(hi);
  return {hi, at::vec::convert_float_bfloat16(first - first_hi, second - second_hi)};
}

// The halves of x (N, D) float32, packed as they are made
std::pair<PackedRows, PackedRows> packed_halves(const Tensor& x) {
  std::pair<PackedRows, PackedRows> packed{x, x};
  auto& [hi, lo] = packed;
  const int64_t D = hi.D, pairs = hi.pairs, stride = x.stride(0), steps = ceil_div(pairs, PAIRS);
  const float* from = x.const_data_ptr<float>();
  at::parallel_for(0, hi.blocks * steps, 1, [&](int64_t begin, int64_t end) {
    // a pair of bfloat16 numbers moves as one of 32 bits
    alignas(64) float high[TILE_M * PAIRS], low[TILE_M * PAIRS];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / steps, pair = i % steps * PAIRS, d = 2 * pair;
      const int64_t some = std::min(PAIRS, pairs - pair), rows = hi.block_rows(block);
      for (int64_t m = 0; m < TILE_M; ++m) {
        const auto load = [&](int64_t at) {
          const int64_t width = m < rows ? std::clamp<int64_t>(D - at, 0, LANES) : 0;
          return width ? Vec::loadu(from + (block * TILE_M + m) * stride + at, width) : Vec(0.f);
        };
        const auto [h, l] = halves(load(d), load(d + LANES));
        h.store(high + m * PAIRS), l.store(low + m * PAIRS);
      }
      const auto transpose = [&](const float* half, PackedRows& to) {
        float* at = reinterpret_cast<float*>(to.block(block)) + pair * TILE_M;
        at::vec::transpose_mxn<float>(half, PAIRS, at, TILE_M, TILE_M, some);
      };
      transpose(high, hi), transpose(low, lo);
    }
  });
  return packed;
}

}  // namespace

void bfloat16_logits(Tensor out, const Tensor& x, const Tensor& weight) {
  const PackedRows rows = PackedRows::of(x);
  multiply({{by_rows(weight), rows}}, std::nullopt, out);
}

Tensor split_linear(const Tensor& x, const Tensor& hi, const Maybe& lo, const Maybe& bias) {
  Tensor y = x.new_empty({x.size(0), hi.size(0)});
  const auto [x_hi, x_lo] = packed_halves(x);
  const Tensor high = by_rows(hi);
  std::vector<Product> products{{high, x_hi}, {high, x_lo}};
  if (lo) products.push_back({by_rows(*lo), x_hi});
  multiply(products, bias ? Maybe(bias->contiguous()) : std::nullopt, y);
  return y;
}

}  // namespace sepo
