// One response behind its prompt, as tiles to be multiplied: 64 queries by 64 keys.
//
// A pair [prompt | chosen | rejected] is two ordinary causal sequences, prompt + chosen and
// prompt + rejected; the second asks from its first rejected token on. In a sequence, position is
// index: a query sees keys up to its own position, and with a window only the last so many.
//
// In is the tensors' type, bfloat16 or float; T that of the tiles, which is In or wider. bfloat16
// tiles are multiplied by oneDNN's brgemm, float ones by small_products.h.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "small_products.h"

namespace sepo {

constexpr int64_t TILE = 64;  // a float32 tile is 16 KiB: half of a first-level cache
template <typename T>
using TileOf = T[TILE * TILE];  // (queries, keys)

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
template <typename In>
struct HeadOf {
  const In* data;
  int64_t stride;  // of a row

  HeadOf(const at::Tensor& x, int64_t head)
      : data(x.const_data_ptr<In>() + head * x.stride(1)), stride(x.stride(0)) {}
  const In* row(int64_t n) const { return data + n * stride; }
};

template <typename In, typename T>
inline void copy_row(const In* from, int64_t d, T* to) {
  if constexpr (std::is_same_v<In, T>)
    std::copy_n(from, d, to);
  else
    for (int64_t j = 0; j < d; ++j) to[j] = static_cast<T>(from[j]);
}

// Right operands, a tile of 64 keys after the other. Rows beyond the sequence are zeros: what
// multiplies them is masked, but a NaN would survive the mask.
template <typename T>
struct Operand {
  static constexpr bool PAIRED = std::is_same_v<T, at::BFloat16>;  // brgemm's order: two k together
  std::vector<T> data;
  int64_t d;

  const T* tile(int64_t t) const { return data.data() + t * TILE * d; }

  // x.T: (d, 64 keys), paired (d / 2, 64 keys, 2)
  template <typename In>
  void transposed(const Sequence& s, const HeadOf<In>& x, int64_t width) {
    start(s, width);
    for (int64_t i = 0; i < s.length; ++i) {
      T* to = data.data() + i / TILE * TILE * d;
      const In* from = x.row(s.row(i));
      if constexpr (PAIRED) {
        uint32_t pair, *pairs = reinterpret_cast<uint32_t*>(to) + i % TILE;
        for (int64_t j = 0; j < d / 2; ++j) {
          std::memcpy(&pair, from + 2 * j, sizeof pair);
          pairs[j * TILE] = pair;
        }
      } else {
        for (int64_t j = 0; j < d; ++j) to[j * TILE + i % TILE] = static_cast<T>(from[j]);
      }
    }
  }

  // x: (64 keys, d), paired (64 keys / 2, d, 2)
  template <typename In>
  void as_it_is(const Sequence& s, const HeadOf<In>& x, int64_t width) {
    start(s, width);
    for (int64_t i = 0; i < s.length; ++i) {
      const In* from = x.row(s.row(i));
      if constexpr (PAIRED) {
        T* to = data.data() + i / 2 * 2 * d + i % 2;
        for (int64_t j = 0; j < d; ++j) to[2 * j] = from[j];
      } else {
        copy_row(from, d, data.data() + i * d);
      }
    }
  }

 private:
  void start(const Sequence& s, int64_t width) {
    d = width;
    data.assign(s.tiles() * TILE * d, T(0.f));
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
  template <typename In, typename T>
  void copy(const Sequence& s, const HeadOf<In>& x, int64_t d, T* to) const {
    for (int64_t i = 0; i < count(); ++i) copy_row(x.row(s.row(first + i)), d, to + i * d);
    std::fill(to + count() * d, to + TILE * d, T(0.f));
  }
};

// c (m, n) = or += a (m, k) b, b in brgemm's order; every leading dimension is its matrix's width
inline void multiply(int64_t m, int64_t n, int64_t k, const at::BFloat16* a, const at::BFloat16* b,
                     float* c, bool add) {
  at::native::cpublas::brgemm(m, n, k, k, n, n, add, a, b, c);
}

// Two vectors, rounded to T if need be
inline void store(const Vec& a, const Vec& b, at::BFloat16* to) {
  at::vec::convert_float_bfloat16(a, b).store(to);
}
inline void store(const Vec& a, const Vec& b, float* to) {
  a.store(to);
  b.store(to + LANES);
}

template <typename In>
inline void store_row(const float* from, float scale, int64_t d, In* to) {
  const Vec factor(scale);
  for (int64_t j = 0; j < d; j += 2 * LANES)
    store(Vec::loadu(from + j) * factor, Vec::loadu(from + j + LANES) * factor, to + j);
}

// e^x: to float's last bits where the tensors are float, else to about 20 bits of them
template <typename In>
inline Vec exponential(const Vec& x) {
  if constexpr (std::is_same_v<In, float>) return x.exp();
  return x.exp_u20();
}

}  // namespace sepo
