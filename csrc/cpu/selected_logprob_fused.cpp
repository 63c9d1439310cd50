// selected_logprob for bfloat16: GEMM, log-sum-exp and dlogits in one pass over the vocabulary,
// from float32 logits that stay in cache.
//
// With c the target's own logit, known beforehand from one dot product, and e_v = exp(z_v - c):
//
//   tail = sum of e_v over v != target       logp = -log1p(tail)       p_v = e_v / (1 + tail)
//
// So e_v is stored at once in its final form, and the backward's factor includes 1 / (1 + tail).
// The target's own entry outweighs all others of its row together. It is left out here; the
// backward adds its part in float32, from logp.
// bfloat16 has float32's range, so no e_v that matters is rounded to zero. Only a target less
// likely than 2^-60 needs another c: such rows are redone from their largest logit.

#include <tuple>

#include "head_tiles.h"
#include "operators.h"

namespace sepo {
namespace {

struct Results {
  at::Tensor logp, lse, row_scale;  // (M,) float32
  std::vector<int64_t> to_redo;  // rows whose sum is too large for their c
};

// Sums the tail (M,) of the references c; writes e_v cap'(z_v) to dlogits (V, M), rows at stride ld
template <bool WRITE_DLOGITS>
Partial sum_pass(
    const Heads<1>& heads, const TargetIndex& index, const int64_t* targets,
    const std::vector<float>& c, at::BFloat16* dlogits, int64_t ld) {
  const Head& head = heads.head[0];
  const auto reference = padded_copy(c, heads.padded());
  const Vec one(1.f), inverse_cap(head.inverse_cap());
  Partial tail(heads.groups(), heads.padded(), 0.f);
  for_each_tile(heads, [&](int64_t group, int64_t v0, int64_t count, int64_t block, Tile* tiles) {
    float* z = tiles[0];
    const int64_t m0 = block * TILE_M, in_block = heads.rows[0].block_rows(block);
    index.visit(v0, m0, m0 + in_block, [&](int64_t m) {
      z[(targets[m] - v0) * TILE_M + m - m0] = -INFINITE;  // the tail is summed without it
    });
    for (int64_t lane = 0; lane < in_block; lane += 2 * LANES) {
      const Vec c0 = Vec::loadu(&reference[m0 + lane]);
      const Vec c1 = Vec::loadu(&reference[m0 + lane + LANES]);
      const int64_t width = std::min(2 * LANES, in_block - lane);
      Vec sum0(0.f), sum1(0.f);
      for (int64_t v = 0; v < count; ++v) {
        const Vec y0 = Vec::loadu(z + v * TILE_M + lane);
        const Vec y1 = Vec::loadu(z + v * TILE_M + lane + LANES);
        Vec e0 = (y0 - c0).exp_u20(), e1 = (y1 - c1).exp_u20();
        sum0 = sum0 + e0;
        sum1 = sum1 + e1;
        if constexpr (WRITE_DLOGITS) {
          if (head.softcap) {
            const Vec t0 = y0 * inverse_cap, t1 = y1 * inverse_cap;
            e0 = e0 * (one - t0 * t0);
            e1 = e1 * (one - t1 * t1);
          }
          at::vec::convert_float_bfloat16(e0, e1).store(dlogits + (v0 + v) * ld + m0 + lane, width);
        }
      }
      float* sums = tail.at(group, m0 + lane);
      (Vec::loadu(sums) + sum0).store(sums);
      (Vec::loadu(sums + LANES) + sum1).store(sums + LANES);
    }
  });
  return tail;
}

// dlogits: (M, V) with the rows as its fast dimension, or undefined
Results run(
    const Heads<1>& heads, const int64_t* targets, const std::vector<float>& target,
    const std::vector<float>& c, const at::Tensor& dlogits) {
  const int64_t M = heads.M(), ld = dlogits.defined() ? dlogits.stride(1) : 0;
  auto* out = dlogits.defined() ? dlogits.mutable_data_ptr<at::BFloat16>() : nullptr;
  const TargetIndex index(targets, M, heads.V());
  const Partial partial = out ? sum_pass<true>(heads, index, targets, c, out, ld)
                              : sum_pass<false>(heads, index, targets, c, nullptr, 0);
  Results results{heads.floats({M}), heads.floats({M}), heads.floats({M}), {}};
  float *logp = results.logp.mutable_data_ptr<float>(),
        *lse = results.lse.mutable_data_ptr<float>(),
        *row_scale = results.row_scale.mutable_data_ptr<float>();
  for (int64_t m = 0; m < M; ++m) {
    const float tail = partial.sum(m), distance = target[m] - c[m], sum = tail + std::exp(distance);
    logp[m] = distance == 0.f ? -std::log1p(tail) : distance - std::log(sum);
    lse[m] = target[m] - logp[m];
    row_scale[m] = 1.f / sum;
    if (out) out[targets[m] * ld + m] = 0.f;  // 0 * -inf where capped
    if (!(sum < LARGEST_SUM)) results.to_redo.push_back(m);
  }
  return results;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> logprob_fused(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& targets, double scale, std::optional<double> softcap,
    const std::optional<at::Tensor>& dlogits, const std::optional<at::Tensor>& scales) {
  const at::Tensor at = targets.contiguous(), out = dlogits.value_or(at::Tensor());
  const Head head(x, weight, bias, scale, softcap, scales);
  const auto target = target_logits(head, at.const_data_ptr<int64_t>());
  Results results = run(pack(head), at.const_data_ptr<int64_t>(), target, target, out);
  if (!results.to_redo.empty()) {
    const at::Tensor index = as_index(results.to_redo, at), some_at = at.index_select(0, index);
    const Head some = head.at_rows(index);
    const auto heads = pack(some);
    const at::Tensor some_out =
        dlogits ? out.new_empty({heads.V(), heads.M()}).t() : at::Tensor();
    const int64_t* some_targets = some_at.const_data_ptr<int64_t>();
    const Results redone = run(heads, some_targets, target_logits(some, some_targets),
                             largest_logits(heads)[0], some_out);
    results.logp.index_copy_(0, index, redone.logp);
    results.lse.index_copy_(0, index, redone.lse);
    results.row_scale.index_copy_(0, index, redone.row_scale);
    if (dlogits) out.index_copy_(0, index, some_out);
  }
  return {results.logp, results.lse, results.row_scale};
}

}  // namespace sepo
