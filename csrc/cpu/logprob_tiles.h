// One pass over the tiles of a bfloat16 head that sums what log-probabilities need, and on request
// what the other statistics of a row do. See selected_logprob_fused.cpp for the idea.
#pragma once

#include <optional>
#include <vector>

#include "head_tiles.h"

namespace sepo {

enum class Write { NOTHING, DLOGITS, LOGITS };

constexpr float FAR = 128.f;       // below a reference: e^-128 is 0, and a sum of logits finite
constexpr float LOWEST = -1024.f;  // whose exponential is 0 too; finite, so that 0 log 0 = 0

// What is written of each tile, (V, M) with rows at stride ld: e_v cap'(z_v), or the logits
struct Block {
  at::BFloat16* dlogits = nullptr;
  float* logits = nullptr;
  int64_t ld = 0;
};

// What a statistics call sums beside e^(z - c), of all entries but the target's, y = z - c
struct Statistics {
  Partial weighted, squares, total;  // of e^y y, of e^2y, of z with the target's at c - FAR
  Partial top;  // the largest z; of the target's group without those that come before its tile
  std::vector<float> before;  // (M,) the largest z before the target, in its group
  std::vector<float> at_target;  // (M,) its logit as the tiles have it, whose last bits may differ

  Statistics(int64_t groups, int64_t padded, int64_t M)
      : weighted(groups, padded, 0.f), squares(weighted), total(weighted),
        top(groups, padded, -INFINITE), before(M), at_target(M) {}

  // Takes the target of row m out of its tile, whose column z of `count` entries has it at `own`
  void take(int64_t group, int64_t m, float* z, int64_t own, float c) {
    float highest = *top.at(group, m);
    for (int64_t v = 0; v < own; ++v) highest = std::max(highest, z[v * TILE_M]);
    before[m] = highest;
    *top.at(group, m) = -INFINITE;
    at_target[m] = z[own * TILE_M];
    z[own * TILE_M] = c - FAR;
  }

  // whether the target is the first of the largest logits
  bool is_first(int64_t m, int64_t target, int64_t groups) const {
    const int64_t group = target / GROUP_V;
    return at_target[m] > std::max(before[m], top.max(m, 0, group)) &&
        at_target[m] >= top.max(m, group, groups);
  }
};

// Sums e^(z - c) (M,) of all but the targets; fills `more` if STATISTICS
template <Write WRITE, bool STATISTICS>
Partial sum_pass(
    const Heads<1>& heads, const TargetIndex& index, const int64_t* targets,
    const std::vector<float>& c, const Block& out, Statistics* more) {
  const Head& head = heads.head[0];
  const auto reference = padded_copy(c, heads.padded());
  const Vec one(1.f), inverse_cap(head.inverse_cap()), lowest(LOWEST);
  Partial tail(heads.groups(), heads.padded(), 0.f);
  for_each_tile(heads, [&](int64_t group, int64_t v0, int64_t count, int64_t block, Tile* tiles) {
    float* z = tiles[0];
    const int64_t m0 = block * TILE_M, in_block = heads.rows[0].block_rows(block);
    index.visit(v0, m0, m0 + in_block, [&](int64_t m) {
      if constexpr (STATISTICS) {
        more->take(group, m, z + m - m0, targets[m] - v0, c[m]);
      } else {
        z[(targets[m] - v0) * TILE_M + m - m0] = -INFINITE;  // the tail is summed without it
      }
    });
    for (int64_t lane = 0; lane < in_block; lane += 2 * LANES) {
      const Vec c0 = Vec::loadu(&reference[m0 + lane]);
      const Vec c1 = Vec::loadu(&reference[m0 + lane + LANES]);
      const int64_t width = std::min(2 * LANES, in_block - lane);
      Vec sum0(0.f), sum1(0.f);
      [[maybe_unused]] std::array<Vec, 2> weighted{Vec(0.f), Vec(0.f)}, squares = weighted,
          total = weighted, top{Vec(-INFINITE), Vec(-INFINITE)};
      for (int64_t v = 0; v < count; ++v) {
        const Vec z0 = Vec::loadu(z + v * TILE_M + lane);
        const Vec z1 = Vec::loadu(z + v * TILE_M + lane + LANES);
        const Vec y0 = z0 - c0, y1 = z1 - c1;
        Vec e0 = y0.exp_u20(), e1 = y1.exp_u20();
        sum0 = sum0 + e0;
        sum1 = sum1 + e1;
        if constexpr (STATISTICS) {
          weighted[0] = at::vec::fmadd(e0, at::vec::maximum(y0, lowest), weighted[0]);
          weighted[1] = at::vec::fmadd(e1, at::vec::maximum(y1, lowest), weighted[1]);
          squares[0] = at::vec::fmadd(e0, e0, squares[0]);
          squares[1] = at::vec::fmadd(e1, e1, squares[1]);
          total[0] = total[0] + z0;
          total[1] = total[1] + z1;
          top[0] = at::vec::maximum(top[0], z0);
          top[1] = at::vec::maximum(top[1], z1);
        }
        if constexpr (WRITE == Write::DLOGITS) {
          if (head.softcap) {
            const Vec t0 = z0 * inverse_cap, t1 = z1 * inverse_cap;
            e0 = e0 * (one - t0 * t0);
            e1 = e1 * (one - t1 * t1);
          }
          at::vec::convert_float_bfloat16(e0, e1)
              .store(out.dlogits + (v0 + v) * out.ld + m0 + lane, width);
        } else if constexpr (WRITE == Write::LOGITS) {
          float* to = out.logits + (v0 + v) * out.ld + m0 + lane;
          z0.store(to, std::min(LANES, width));
          if (width > LANES) z1.store(to + LANES, width - LANES);
        }
      }
      const auto add = [&](Partial& sums, Vec part0, Vec part1) {
        float* at = sums.at(group, m0 + lane);
        (Vec::loadu(at) + part0).store(at);
        (Vec::loadu(at + LANES) + part1).store(at + LANES);
      };
      add(tail, sum0, sum1);
      if constexpr (STATISTICS) {
        add(more->weighted, weighted[0], weighted[1]);
        add(more->squares, squares[0], squares[1]);
        add(more->total, total[0], total[1]);
        float* at = more->top.at(group, m0 + lane);
        at::vec::maximum(Vec::loadu(at), top[0]).store(at);
        at::vec::maximum(Vec::loadu(at + LANES), top[1]).store(at + LANES);
      }
    }
  });
  return tail;
}

struct Logprobs {
  at::Tensor logp, lse, row_scale;  // (M,) float32
  std::vector<int64_t> to_redo;     // rows whose sum is too large for their c
};

// From the targets' logits and the references c; writes zero at the targets of dlogits
inline Logprobs logprobs(
    const Heads<1>& heads, const int64_t* targets, const std::vector<float>& target,
    const std::vector<float>& c, const Partial& tails, const Block& out) {
  const int64_t M = heads.M();
  Logprobs results{heads.floats({M}), heads.floats({M}), heads.floats({M}), {}};
  float *logp = results.logp.mutable_data_ptr<float>(),
        *lse = results.lse.mutable_data_ptr<float>(),
        *row_scale = results.row_scale.mutable_data_ptr<float>();
  for (int64_t m = 0; m < M; ++m) {
    const float tail = tails.sum(m), distance = target[m] - c[m], sum = tail + std::exp(distance);
    logp[m] = distance == 0.f ? -std::log1p(tail) : distance - std::log(sum);
    lse[m] = target[m] - logp[m];
    row_scale[m] = 1.f / sum;
    if (out.dlogits) out.dlogits[targets[m] * out.ld + m] = 0.f;  // 0 * -inf where capped
    if (!(sum < LARGEST_SUM)) results.to_redo.push_back(m);
  }
  return results;
}

}  // namespace sepo
