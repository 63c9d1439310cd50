// One response behind its prompt, as the tiles that brgemm multiplies: 64 queries by 64 keys.
//
// A pair [prompt | chosen | rejected] is two ordinary causal sequences, prompt + chosen and
// prompt + rejected; the second asks from its first rejected token on. In a sequence, position is
// index: a query sees keys up to its own position, and with a window only the last so many.
#pragma once

#include <ATen/ATen.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "vectors.h"

namespace sepo {

constexpr int64_t TILE = 64;  // a float32 tile is 16 KiB: half of a first-level cache
using Tile32 = float[TILE * TILE];       // (queries, keys)
using Tile16 = at::BFloat16[TILE * TILE];

struct Sequence {
  int64_t start, prompt, response;  // buffer rows of the pair's first and first response token
  int64_t length, first_query;      // in positions

  int64_t row(int64_t position) const {
    return position < prompt ? start + position : response + position - prompt;
  }
  int64_t tiles() const { return ceil_div(length, TILE); }
};

inline Sequence chosen_sequence(const int64_t* span) {  // (start, prefix_end, rejected_start, end)
  return {span[0], span[1] - span[0], span[1], span[2] - span[0], 0};
}
inline Sequence rejected_sequence(const int64_t* span) {
  const int64_t prompt = span[1] - span[0];
  return {span[0], prompt, span[2], prompt + span[3] - span[2], prompt};
}

// One head of a (N, heads, d) tensor whose last dimension is contiguous
struct HeadOf {
  const at::BFloat16* data;
  int64_t stride;  // of a row

  HeadOf(const at::Tensor& x, int64_t head)
      : data(x.const_data_ptr<at::BFloat16>() + head * x.stride(1)), stride(x.stride(0)) {}
  const at::BFloat16* row(int64_t n) const { return data + n * stride; }
};

// Right operands of brgemm, a tile of 64 keys after the other. Rows beyond the sequence are zeros:
// what multiplies them is masked, but a NaN would survive the mask.
struct Operand {
  std::vector<at::BFloat16> data;
  int64_t d;

  const at::BFloat16* tile(int64_t t) const { return data.data() + t * TILE * d; }

  // x.T: (d / 2, 64 keys, 2)
  void transposed(const Sequence& s, const HeadOf& x, int64_t width) {
    start(s, width);
    for (int64_t i = 0; i < s.length; ++i) {
      uint32_t pair, *to = reinterpret_cast<uint32_t*>(data.data() + i / TILE * TILE * d) + i % TILE;
      const at::BFloat16* from = x.row(s.row(i));
      for (int64_t j = 0; j < d / 2; ++j) {
        std::memcpy(&pair, from + 2 * j, sizeof pair);
        to[j * TILE] = pair;
      }
    }
  }

  // x: (64 keys / 2, d, 2)
  void as_it_is(const Sequence& s, const HeadOf& x, int64_t width) {
    start(s, width);
    for (int64_t i = 0; i < s.length; ++i) {
      at::BFloat16* to = data.data() + i / 2 * 2 * d + i % 2;
      const at::BFloat16* from = x.row(s.row(i));
      for (int64_t j = 0; j < d; ++j) to[2 * j] = from[j];
    }
  }

 private:
  void start(const Sequence& s, int64_t width) {
    d = width;
    data.assign(s.tiles() * TILE * d, at::BFloat16(0.f));
  }
};

// The queries of one tile, and which tiles of keys they see
struct QueryBlock {
  int64_t first, last;  // positions
  int64_t tile_begin, tile_end, window;

  QueryBlock(const Sequence& s, int64_t first, int64_t window)
      : first(first),
        last(std::min(first + TILE, s.length)),
        tile_begin(window ? std::max<int64_t>(0, first - window + 1) / TILE : 0),
        tile_end(ceil_div(last, TILE)),
        window(window) {}

  int64_t count() const { return last - first; }

  // Scores of what a query does not see become -inf: exp makes zeros of them
  void mask(int64_t tile, float* z) const {
    const int64_t key = tile * TILE;
    const bool whole = key + TILE - 1 <= first && (!window || last - key <= window);
    if (whole) return;
    constexpr float hidden = -std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < TILE; ++i) {
      const int64_t position = std::min(first + i, last - 1);  // padding rows: as the last real one
      const int64_t end = std::clamp<int64_t>(position + 1 - key, 0, TILE);
      std::fill(z + i * TILE + end, z + (i + 1) * TILE, hidden);
      if (!window) continue;
      const int64_t begin = std::clamp<int64_t>(position - window + 1 - key, 0, TILE);
      std::fill(z + i * TILE, z + i * TILE + begin, hidden);
    }
  }

  // Rows of x as a left operand, (64, d), zeros after the last
  void copy(const Sequence& s, const HeadOf& x, int64_t d, at::BFloat16* to) const {
    for (int64_t i = 0; i < count(); ++i) std::copy_n(x.row(s.row(first + i)), d, to + i * d);
    std::fill(to + count() * d, to + TILE * d, at::BFloat16(0.f));
  }
};

// c (m, n) = or += a (m, k) b, b in brgemm's order; every leading dimension is its matrix's width
inline void multiply(int64_t m, int64_t n, int64_t k, const at::BFloat16* a, const at::BFloat16* b,
                     float* c, bool add) {
  at::native::cpublas::brgemm(m, n, k, k, n, n, add, a, b, c);
}

inline void store_row(const float* from, float scale, int64_t d, at::BFloat16* to) {
  const Vec factor(scale);
  for (int64_t j = 0; j < d; j += 2 * LANES) {
    const auto a = Vec::loadu(from + j) * factor;
    const auto b = Vec::loadu(from + j + LANES) * factor;
    at::vec::convert_float_bfloat16(a, b).store(to + j);
  }
}

}  // namespace sepo
