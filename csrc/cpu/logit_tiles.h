// Logits in float32, one tile of the vocabulary at a time: a tile is read while it is in cache, and
// never stored. bfloat16 operands, float32 sums (oneDNN's brgemm, through torch's own header).
//
// The tile is z.T: vocabulary entries down, rows across. So the weight is the left operand, read
// once and as it lies; only the few rows are packed; and a row's sums are lanes of a vector.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace sepo {

constexpr int64_t TILE_V = 64;        // vocabulary entries of a tile
constexpr int64_t TILE_M = 64;        // rows of a tile: 16 KiB of float32, half of a first-level cache
constexpr int64_t GROUP_TILES = 8;    // tiles of one task: it has sums of its own
constexpr int64_t GROUP_V = TILE_V * GROUP_TILES;

// x.T in blocks of TILE_M rows, as brgemm wants its right operand: (blocks, ceil(D / 2), TILE_M, 2)
class PackedRows {
 public:
  explicit PackedRows(const at::Tensor& x)  // (M, D), of which it has the shape: nothing is packed
      : M(x.size(0)), D(x.size(1)), blocks(ceil_div(M, TILE_M)), pairs(ceil_div(D, 2)) {
    data_ = x.new_empty({blocks, pairs, TILE_M, 2}, at::kBFloat16);
  }

  static PackedRows of(const at::Tensor& x) {  // (M, D) bfloat16, last dimension contiguous
    PackedRows packed(x);
    const int64_t M = packed.M, D = packed.D, pairs = packed.pairs, stride = x.stride(0);
    auto* out = reinterpret_cast<uint16_t*>(packed.block(0));
    const auto* in = reinterpret_cast<const uint16_t*>(x.const_data_ptr<at::BFloat16>());
    at::parallel_for(0, packed.blocks * pairs, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i / pairs * TILE_M, d = i % pairs * 2;
        uint16_t* to = out + i * TILE_M * 2;
        for (int64_t m = 0; m < TILE_M; ++m) {
          const uint16_t* row = in + (first + m) * stride + d;
          const bool real = first + m < M;
          to[2 * m] = real ? row[0] : 0;
          to[2 * m + 1] = real && d + 1 < D ? row[1] : 0;  // zero bits are the number zero
        }
      }
    });
    return packed;
  }

  const at::BFloat16* block(int64_t b) const {
    return data_.const_data_ptr<at::BFloat16>() + b * pairs * TILE_M * 2;
  }
  at::BFloat16* block(int64_t b) {
    return data_.mutable_data_ptr<at::BFloat16>() + b * pairs * TILE_M * 2;
  }
  int64_t block_rows(int64_t b) const { return std::min(TILE_M, M - b * TILE_M); }

  const int64_t M, D, blocks, pairs;

 private:
  at::Tensor data_;
};

// The weight with its rows contiguous
inline at::Tensor by_rows(const at::Tensor& weight) {
  return weight.stride(1) == 1 ? weight : weight.contiguous();
}

// Up to TILE_V rows of the weight as brgemm's left operand. An odd width is copied and padded with
// zeros: brgemm would multiply the entry after the row's end, which may be NaN.
class WeightTile {
 public:
  explicit WeightTile(const at::Tensor& weight)  // (V, D) bfloat16, last dimension contiguous
      : data_(weight.const_data_ptr<at::BFloat16>()), stride_(weight.stride(0)), D_(weight.size(1)) {
    if (D_ % 2) padded_.resize(TILE_V * (D_ + 1));
  }

  void load(int64_t v, int64_t count) {
    tile_ = data_ + v * stride_;
    count_ = count;
    if (padded_.empty()) return;
    for (int64_t i = 0; i < count; ++i) std::copy_n(tile_ + i * stride_, D_, &padded_[i * (D_ + 1)]);
    tile_ = padded_.data();
  }

  // z[v, m] = or += weight[v] . x[m] for the loaded entries and all rows of a block, z: (count, TILE_M)
  void multiply(const PackedRows& x, int64_t block, float* z, bool add = false) const {
    const int64_t columns = std::min(TILE_M, ceil_div(x.block_rows(block), 32) * 32);
    at::native::cpublas::brgemm(
        count_, columns, x.pairs * 2, padded_.empty() ? stride_ : D_ + 1, TILE_M, TILE_M,
        add, tile_, x.block(block), z);
  }

 private:
  const at::BFloat16* data_;
  const at::BFloat16* tile_ = nullptr;
  const int64_t stride_, D_;
  int64_t count_ = 0;
  std::vector<at::BFloat16> padded_;
};

// Calls work(group, first tile's v, end v) on every group of columns, in parallel.
template <typename Work>
void for_each_group(int64_t V, const Work& work) {
  at::parallel_for(0, ceil_div(V, GROUP_V), 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) work(g, g * GROUP_V, std::min(V, (g + 1) * GROUP_V));
    at::native::cpublas::brgemm_release();
  });
}

// Which rows have their target in a tile: the pairs (row, target) sorted by tile, then by row.
class TargetIndex {
 public:
  TargetIndex(const int64_t* targets, int64_t M, int64_t V) : start_(ceil_div(V, TILE_V) + 1) {
    for (int64_t m = 0; m < M; ++m) ++start_[targets[m] / TILE_V + 1];
    for (size_t i = 1; i < start_.size(); ++i) start_[i] += start_[i - 1];
    row_.resize(M);
    std::vector<int64_t> next(start_);
    for (int64_t m = 0; m < M; ++m) row_[next[targets[m] / TILE_V]++] = m;
  }

  // rows m in [from, to) whose target is in the tile that starts at v
  template <typename Visit>
  void visit(int64_t v, int64_t from, int64_t to, const Visit& visit) const {
    const auto begin = row_.begin() + start_[v / TILE_V], end = row_.begin() + start_[v / TILE_V + 1];
    for (auto it = std::lower_bound(begin, end, from); it != end && *it < to; ++it) visit(*it);
  }

 private:
  std::vector<int64_t> start_, row_;
};

}  // namespace sepo
