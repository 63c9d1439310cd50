// Logits of one or two language-model heads, finished (scale, bias, soft cap) tile by tile.
#pragma once

#include <array>
#include <cmath>
#include <limits>
#include <optional>

#include "logit_tiles.h"

namespace sepo {

constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float LARGEST_SUM = 0x1p60f;  // beyond, 1 / sum times a row would leave bfloat16's range

struct Head {
  at::Tensor x;       // (M, D) bfloat16
  at::Tensor weight;  // (V, D) bfloat16, last dimension contiguous
  at::Tensor bias;    // (V,) bfloat16 or undefined
  float scale;
  std::optional<float> softcap;
  std::vector<float> scales;  // of whole tiles of rows, in the place of scale, or empty

  Head(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
       double scale, std::optional<double> softcap, const std::optional<at::Tensor>& scales)
      : x(x.contiguous()),
        weight(by_rows(weight)),
        bias(bias ? bias->contiguous() : at::Tensor()),
        scale(static_cast<float>(scale)),
        softcap(softcap ? std::optional<float>(*softcap) : std::nullopt),
        scales(scales ? of_tiles(*scales) : std::vector<float>()) {}

  Head at_rows(const at::Tensor& index) const {
    Head some = *this;
    some.x = x.index_select(0, index);
    const int64_t* row = index.const_data_ptr<int64_t>();
    if (!scales.empty())
      for (int64_t i = 0; i < index.size(0); ++i) some.scales[i] = scales[row[i]];
    return some;
  }
  float bias_at(int64_t v) const {
    return bias.defined() ? static_cast<float>(bias.const_data_ptr<at::BFloat16>()[v]) : 0.f;
  }
  float scale_at(int64_t m) const { return scales.empty() ? scale : scales[m]; }
  float inverse_cap() const { return softcap ? 1.f / *softcap : 0.f; }

 private:
  static std::vector<float> of_tiles(const at::Tensor& values) {  // (M,) float32
    const at::Tensor flat = values.contiguous();
    const float* data = flat.const_data_ptr<float>();
    std::vector<float> copy(data, data + flat.size(0));
    copy.resize(ceil_div(flat.size(0), TILE_M) * TILE_M, 0.f);
    return copy;
  }
};

inline float dot(const at::BFloat16* a, const at::BFloat16* b, int64_t n) {
  Vec sum0(0.f), sum1(0.f);
  int64_t i = 0;
  for (; i + VecBf16::size() <= n; i += VecBf16::size()) {
    auto [a0, a1] = at::vec::convert_bfloat16_float(VecBf16::loadu(a + i));
    auto [b0, b1] = at::vec::convert_bfloat16_float(VecBf16::loadu(b + i));
    sum0 = at::vec::fmadd(a0, b0, sum0);
    sum1 = at::vec::fmadd(a1, b1, sum1);
  }
  float total = at::vec::vec_reduce_all<float>([](Vec& p, Vec& q) { return p + q; }, sum0 + sum1);
  for (; i < n; ++i) total += static_cast<float>(a[i]) * static_cast<float>(b[i]);
  return total;
}

// Each row's logit of its own target, (M,)
inline std::vector<float> target_logits(const Head& head, const int64_t* targets) {
  const int64_t M = head.x.size(0), D = head.x.size(1);
  const auto* x = head.x.const_data_ptr<at::BFloat16>();
  const auto* w = head.weight.const_data_ptr<at::BFloat16>();
  std::vector<float> z(M);
  at::parallel_for(0, M, 64, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const float raw = dot(x + m * D, w + targets[m] * head.weight.stride(0), D);
      z[m] = raw * head.scale_at(m) + head.bias_at(targets[m]);
      if (head.softcap) z[m] = *head.softcap * std::tanh(z[m] / *head.softcap);
    }
  });
  return z;
}

// Finishes logits in place (scale, bias, soft cap), for the tile that starts at entry v0 and row m0
template <bool SCALE_EACH>
void finish_tile(const Head& head, int64_t v0, int64_t m0, int64_t count, float* z) {
  const Vec one(head.scale), cap(head.softcap.value_or(1.f)), inverse(head.inverse_cap());
  for (int64_t v = 0; v < count; ++v) {
    const Vec bias(head.bias_at(v0 + v));
    for (int64_t lane = 0; lane < TILE_M; lane += LANES) {
      float* at = z + v * TILE_M + lane;
      const Vec scale = SCALE_EACH ? Vec::loadu(&head.scales[m0 + lane]) : one;
      Vec y = at::vec::fmadd(Vec::loadu(at), scale, bias);
      if (head.softcap) y = cap * (y * inverse).tanh();
      y.store(at);
    }
  }
}

inline void finish_logits(const Head& head, int64_t v0, int64_t m0, int64_t count, float* z) {
  if (!head.scales.empty()) return finish_tile<true>(head, v0, m0, count, z);
  if (head.scale == 1.f && !head.bias.defined() && !head.softcap) return;
  finish_tile<false>(head, v0, m0, count, z);
}

using Tile = float[TILE_V * TILE_M];  // (count, TILE_M): vocabulary entries down, rows across

// Heads of one vocabulary, read at the same rows
template <size_t N>
struct Heads {
  std::array<Head, N> head;
  std::array<PackedRows, N> rows;
  int64_t V() const { return head[0].weight.size(0); }
  int64_t M() const { return rows[0].M; }
  int64_t padded() const { return rows[0].blocks * TILE_M; }
  int64_t groups() const { return ceil_div(V(), GROUP_V); }
  at::Tensor floats(at::IntArrayRef sizes) const {  // uninitialised
    return head[0].x.new_empty(sizes, at::kFloat);
  }
};

inline Heads<1> pack(const Head& a) { return {{a}, {PackedRows::of(a.x)}}; }
inline Heads<2> pack(const Head& a, const Head& b) {
  return {{a, b}, {PackedRows::of(a.x), PackedRows::of(b.x)}};
}

// Runs visit(group, v0, count, block, tiles) on the logits of every tile, in parallel over groups
template <size_t N, typename Visit>
void for_each_tile(const Heads<N>& heads, const Visit& visit) {
  for_each_group(heads.V(), [&](int64_t group, int64_t first, int64_t last) {
    std::vector<WeightTile> weight;
    for (const Head& head : heads.head) weight.emplace_back(head.weight);
    alignas(64) Tile z[N];
    for (int64_t v0 = first; v0 < last; v0 += TILE_V) {
      const int64_t count = std::min(TILE_V, last - v0);
      for (auto& w : weight) w.load(v0, count);
      for (int64_t block = 0; block < heads.rows[0].blocks; ++block) {
        for (size_t i = 0; i < N; ++i) {
          weight[i].multiply(heads.rows[i], block, z[i]);
          finish_logits(heads.head[i], v0, block * TILE_M, count, z[i]);
        }
        visit(group, v0, count, block, z);
      }
    }
  });
}

// One number for each group of columns and row, reduced in a fixed order whatever the threads did
class Partial {
 public:
  Partial(int64_t groups, int64_t padded, float start)
      : padded_(padded), start_(start), data_(groups * padded, start) {}
  float* at(int64_t group, int64_t m) { return &data_[group * padded_ + m]; }

  double sum(int64_t m) const {
    double total = 0;
    for (size_t i = m; i < data_.size(); i += padded_) total += data_[i];
    return total;
  }
  float max(int64_t m) const { return max(m, 0, data_.size() / padded_); }  // NaN if there is one
  float max(int64_t m, int64_t first, int64_t last) const {  // of some groups
    float top = start_;
    for (size_t i = first * padded_ + m; i < static_cast<size_t>(last * padded_); i += padded_)
      if (std::isnan(data_[i]) || data_[i] > top) top = data_[i];
    return top;
  }

 private:
  int64_t padded_;
  float start_;
  std::vector<float> data_;
};

// The largest logit of each row (M,), for each head; NaN if there is one
template <size_t N>
std::array<std::vector<float>, N> largest_logits(const Heads<N>& heads) {
  std::vector<Partial> top(N, Partial(heads.groups(), heads.padded(), -INFINITE));
  for_each_tile(heads, [&](int64_t group, int64_t, int64_t count, int64_t block, Tile* z) {
    for (size_t i = 0; i < N; ++i)
      for (int64_t lane = 0; lane < TILE_M; lane += LANES) {
        float* at = top[i].at(group, block * TILE_M + lane);
        Vec largest = Vec::loadu(at);
        for (int64_t v = 0; v < count; ++v)
          largest = at::vec::maximum(largest, Vec::loadu(z[i] + v * TILE_M + lane));
        largest.store(at);
      }
  });
  std::array<std::vector<float>, N> largest;
  for (size_t i = 0; i < N; ++i)
    for (int64_t m = 0; m < heads.M(); ++m) largest[i].push_back(top[i].max(m));
  return largest;
}

inline at::Tensor as_index(const std::vector<int64_t>& rows, const at::Tensor& targets) {
  at::Tensor index = targets.new_empty({static_cast<int64_t>(rows.size())});
  std::copy(rows.begin(), rows.end(), index.mutable_data_ptr<int64_t>());
  return index;
}

inline std::vector<float> padded_copy(const std::vector<float>& values, int64_t padded) {
  std::vector<float> copy(values);
  copy.resize(padded, 0.f);
  return copy;
}

}  // namespace sepo
