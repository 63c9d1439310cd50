// One response behind its prompt, as tiles to be multiplied: 64 queries by 64 keys.
//
// A pair [prompt | chosen | rejected] is two ordinary causal sequences, prompt + chosen and
// prompt + rejected; the second asks from its first rejected token on. In a sequence, position is
// index: a query sees keys up to its own position, and with a window only the last so many.
//
// In is the tensors' type, bfloat16 or float; T that of the tiles, which is In or wider. bfloat16
// tiles are multiplied by oneDNN's brgemm, float ones by small_gemm.h.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "small_gemm.h"

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

// The part of a tile that is computed: its queries, each with the keys that it sees, in whole
// panels. brgemm takes whole tiles.
struct Part {
  int64_t queries;  // even
  int64_t offset;   // query i sees keys before offset + i + 1

  int64_t seen(int64_t query) const { return std::clamp<int64_t>(offset + query + 1, 0, TILE); }
  int64_t first_query(int64_t key) const { return std::clamp<int64_t>(key - offset, 0, queries); }

  // Calls block(first, rows, keys) for blocks of queries: rows is a constant, keys whole panels
  template <typename Block>
  void for_blocks(const Block& block) const {
    for_row_blocks(queries, [&](int64_t first, auto rows) {
      block(first, rows, ceil_div(seen(first + rows - 1), PANEL) * PANEL);
    });
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

  template <typename T>
  Part part(int64_t tile) const {
    if constexpr (Operand<T>::PAIRED) return {TILE, TILE};
    return {ceil_div(count(), 2) * 2, first - tile * TILE};
  }

  // Scores of what a query does not see become -inf: exp makes zeros of them
  void mask(int64_t tile, const Part& part, float* z) const {
    const int64_t key = tile * TILE;
    const bool whole = key + TILE - 1 <= first && (!window || last - key <= window);
    if (whole) return;
    constexpr float hidden = -std::numeric_limits<float>::infinity();
    part.for_blocks([&](int64_t block, int64_t rows, int64_t keys) {
      for (int64_t i = block; i < block + rows; ++i) {
        const int64_t position = std::min(first + i, last - 1);  // padding rows: as the last real one
        const int64_t end = std::clamp<int64_t>(position + 1 - key, 0, keys);
        std::fill(z + i * TILE + end, z + i * TILE + keys, hidden);
        if (!window) continue;
        const int64_t begin = std::clamp<int64_t>(position - window + 1 - key, 0, keys);
        std::fill(z + i * TILE, z + i * TILE + begin, hidden);
      }
    });
  }

  // Rows of x as a left operand, (64, d), zeros after the last
  template <typename In, typename T>
  void copy(const Sequence& s, const HeadOf<In>& x, int64_t d, T* to) const {
    for (int64_t i = 0; i < count(); ++i) copy_row(x.row(s.row(first + i)), d, to + i * d);
    std::fill(to + count() * d, to + TILE * d, T(0.f));
  }
};

// Products of a part: of bfloat16 by oneDNN's brgemm, right operands in its order; of float in blocks

// scores (queries, keys) = x (queries, d) y (d, keys)
inline void make_scores(const Part&, int64_t d, const at::BFloat16* x, const at::BFloat16* y,
                        float* scores) {
  at::native::cpublas::brgemm(TILE, TILE, d, d, TILE, TILE, false, x, y, scores);
}
inline void make_scores(const Part& part, int64_t d, const float* x, const float* y, float* scores) {
  part.for_blocks([&](int64_t i, auto rows, int64_t keys) {
    for (int64_t j = 0; j < keys; j += PANEL)
      multiply_rows<rows>(d, {x + i * d, d}, {y + j, TILE}, {scores + i * TILE + j, TILE}, false);
  });
}

// sums (queries, d) = or += weights (queries, keys) y (keys, d)
inline void sum_over_keys(const Part&, int64_t d, const at::BFloat16* weights,
                          const at::BFloat16* y, float* sums, bool add) {
  at::native::cpublas::brgemm(TILE, d, TILE, TILE, d, d, add, weights, y, sums);
}
inline void sum_over_keys(const Part& part, int64_t d, const float* weights, const float* y,
                          float* sums, bool add) {
  part.for_blocks([&](int64_t i, auto rows, int64_t) {
    const int64_t seen = part.seen(i + rows - 1);
    for (int64_t j = 0; j < d; j += PANEL)
      multiply_rows<rows>(seen, {weights + i * TILE, TILE}, {y + j, d}, {sums + i * d + j, d}, add);
  });
}

// sums (d, keys) += x (d, queries) weights (queries, keys)
inline void add_over_queries(const Part&, int64_t d, const at::BFloat16* x,
                             const at::BFloat16* weights, float* sums) {
  at::native::cpublas::brgemm(d, TILE, TILE, TILE, TILE, TILE, true, x, weights, sums);
}
inline void add_over_queries(const Part& part, int64_t d, const float* x, const float* weights,
                             float* sums) {
  for (int64_t j = 0; j < TILE; j += PANEL) {
    const int64_t k = part.first_query(j);
    if (k == part.queries) return;  // nor does any query see the keys after these
    for_row_blocks(d, [&](int64_t i, auto rows) {
      multiply_rows<rows>(part.queries - k, {x + i * TILE + k, TILE}, {weights + k * TILE + j, TILE},
                          {sums + i * TILE + j, TILE}, true);
    });
  }
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

// e^x for x of at most 0, and 0 for what float32 has no normal number for: to its last digit, or to
// about 20 bits where the tiles are bfloat16
template <typename T>
inline Vec exponential(const Vec& x) {
  if constexpr (std::is_same_v<T, at::BFloat16>) return x.exp_u20();
  const Vec least(-87.33f);  // a little more than the logarithm of 2^-126
  const Vec y = at::vec::clamp_min(x, least);
  const Vec n = (y * Vec(1.44269504f)).round();
  // log 2 in two parts: n times the first has no rounding error
  const Vec r = at::vec::fmadd(n, Vec(2.12194440e-4f), at::vec::fmadd(n, Vec(-0.693359375f), y));
  // (e^r - 1 - r) / r^2 for |r| <= log(2) / 2: the polynomial whose largest relative error in e^r is
  // least, 3e-9
  Vec q(1.38145400e-3f);
  for (const float next : {8.36874511e-3f, 4.16683908e-2f, 0.166665204f, 0.499999934f})
    q = at::vec::fmadd(q, r, Vec(next));
  const Vec value = at::vec::fmadd(q, r * r, r) + Vec(1.f);
  using Int = at::vec::Vectorized<int32_t>;
  const Int power = (at::vec::convert_to_int_of_same_size(n) + Int(127)) << Int(23);
  return Vec::blendv(value * at::vec::cast<float>(power), Vec(0.f), x < least);
}

}  // namespace sepo
