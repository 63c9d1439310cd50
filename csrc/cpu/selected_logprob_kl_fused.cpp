// selected_logprob_kl for bfloat16: both heads' GEMMs in one pass over the vocabulary, from float32
// logits that stay in cache.
//
// With a, b the logits of policy and reference, each less its logit of the target (or, where the
// target is next to impossible, less its largest), e^a and e^b their exponentials, A and B the
// sums of these, and d = b - a:
//
//   log p = a - log A      log q = b - log B      log q - log p = d - (log B - log A)
//
// Saved for the backward, because A and B are known only at the end: max(e^a, e^b) in bfloat16 and
// d in float16. Of p and q the larger is exact to its rounding and the other is it times e^-|d|;
// near the reference p - q comes from d, not from two rounded numbers.

#include <tuple>

#include "divergence.h"
#include "head_tiles.h"
#include "operators.h"

namespace sepo {
namespace {

using VecHalf = at::vec::Vectorized<at::Half>;
enum State : int64_t { AT_TARGET, LOG_A, LOG_B, SHIFT, INVERSE_CAP, NUM_STATE };
constexpr float NOWHERE = -1e30f;       // a logit without weight, but finite: differences are taken
constexpr float LARGEST_HALF = 60000.f;  // |d| beyond is e^-60000 all the same

struct Pair {
  std::vector<float> a, b;
};

struct Sums {
  Partial a, b, weighted;  // of e^a, of e^b, of d weighted with e^b or e^a; the target left out
};

struct Blocks {
  at::BFloat16* first = nullptr;  // (V, M), rows at stride ld
  at::Half* second = nullptr;
  int64_t ld_first = 0, ld_second = 0;
};

template <bool WRITE_BLOCKS>
Sums sum_pass(
    const Heads<2>& heads, const TargetIndex& index, const int64_t* targets, const Pair& shift,
    Direction direction, Blocks blocks) {
  const auto shift_a = padded_copy(shift.a, heads.padded());
  const auto shift_b = padded_copy(shift.b, heads.padded());
  const Partial zero(heads.groups(), heads.padded(), 0.f);
  Sums sums{zero, zero, zero};
  for_each_tile(heads, [&](int64_t group, int64_t v0, int64_t count, int64_t block, Tile* z) {
    const int64_t m0 = block * TILE_M, in_block = heads.rows[0].block_rows(block);
    index.visit(v0, m0, m0 + in_block, [&](int64_t m) {
      const int64_t at = (targets[m] - v0) * TILE_M + m - m0;
      z[0][at] = z[1][at] = NOWHERE;  // the sums leave it out
    });
    for (int64_t lane = 0; lane < in_block; lane += 2 * LANES) {
      const int64_t m = m0 + lane, width = std::min(2 * LANES, in_block - lane);
      std::array<Vec, 2> sum_a{Vec(0.f), Vec(0.f)}, sum_b = sum_a, weighted = sum_a;
      for (int64_t v = 0; v < count; ++v) {
        std::array<Vec, 2> larger, distance;
        for (int64_t i = 0; i < 2; ++i) {  // LANES rows each
          const int64_t at = v * TILE_M + lane + i * LANES;
          const Vec a = Vec::loadu(z[0] + at), b = Vec::loadu(z[1] + at);
          const Vec to_a = Vec::loadu(&shift_a[m + i * LANES]);
          const Vec to_b = Vec::loadu(&shift_b[m + i * LANES]);
          const Vec exp_a = (a - to_a).exp_u20(), exp_b = (b - to_b).exp_u20();
          larger[i] = at::vec::maximum(exp_a, exp_b);
          // b - a first: near the reference it is exact. It is NaN where both heads rule a word
          // out: without weight it may be 0
          const Vec zero(0.f), any = (b - a) - (to_b - to_a);
          const Vec d = Vec::blendv(at::vec::clamp(any, Vec(-LARGEST_HALF), Vec(LARGEST_HALF)), zero,
                                    larger[i] == zero);
          sum_a[i] = sum_a[i] + exp_a;
          sum_b[i] = sum_b[i] + exp_b;
          weighted[i] = at::vec::fmadd(direction == REF_POLICY ? exp_b : exp_a, d, weighted[i]);
          distance[i] = d;
        }
        if constexpr (WRITE_BLOCKS) {
          at::vec::convert_float_bfloat16(larger[0], larger[1])
              .store(blocks.first + (v0 + v) * blocks.ld_first + m, width);
          at::vec::convert_float_half(distance[0], distance[1])
              .store(blocks.second + (v0 + v) * blocks.ld_second + m, width);
        }
      }
      for (int64_t i = 0; i < 2; ++i) {
        const auto add = [&](Partial& total, Vec part) {
          float* at = total.at(group, m + i * LANES);
          (Vec::loadu(at) + part).store(at);
        };
        add(sums.a, sum_a[i]), add(sums.b, sum_b[i]), add(sums.weighted, weighted[i]);
      }
    }
  });
  return sums;
}

struct Results {
  at::Tensor logp, ref_logp, kl;  // (M,) float32
  at::Tensor state;               // (M, NUM_STATE) float32
  std::vector<int64_t> to_redo;     // rows whose sums are too large for their shift
};

// log(e^distance + tail); exact for a row that is sure of its target
double log_sum(double distance, double tail) {
  return distance == 0. ? std::log1p(tail) : std::log(std::exp(distance) + tail);
}

Results run(
    const Heads<2>& heads, const int64_t* targets, const Pair& target, const Pair& shift,
    Direction direction, const std::optional<at::Tensor>& first,
    const std::optional<at::Tensor>& second) {
  const int64_t M = heads.M();
  Blocks blocks;
  if (first)
    blocks = {first->mutable_data_ptr<at::BFloat16>(), second->mutable_data_ptr<at::Half>(),
            first->stride(1), second->stride(1)};
  const TargetIndex index(targets, M, heads.V());
  const Sums sums = first ? sum_pass<true>(heads, index, targets, shift, direction, blocks)
                          : sum_pass<false>(heads, index, targets, shift, direction, blocks);
  Results results{heads.floats({M}), heads.floats({M}), heads.floats({M}),
              heads.floats({M, NUM_STATE}), {}};
  float* state = results.state.mutable_data_ptr<float>();
  float *logp = results.logp.mutable_data_ptr<float>(),
        *ref_logp = results.ref_logp.mutable_data_ptr<float>(),
        *kl = results.kl.mutable_data_ptr<float>();
  for (int64_t m = 0; m < M; ++m, state += NUM_STATE) {
    const float at_a = target.a[m] - shift.a[m], at_b = target.b[m] - shift.b[m];
    const float d = std::clamp(at_b - at_a, -LARGEST_HALF, LARGEST_HALF);
    const double a = sums.a.sum(m) + std::exp(at_a), b = sums.b.sum(m) + std::exp(at_b);
    const double log_a = log_sum(at_a, sums.a.sum(m)), log_b = log_sum(at_b, sums.b.sum(m));
    const bool by_ref = direction == REF_POLICY;
    const double weighted = sums.weighted.sum(m) + std::exp(by_ref ? at_b : at_a) * d;
    logp[m] = at_a - log_a;
    ref_logp[m] = at_b - log_b;
    kl[m] = by_ref ? weighted / b - (log_b - log_a) : log_b - log_a - weighted / a;
    state[AT_TARGET] = target.a[m];
    state[LOG_A] = log_a, state[LOG_B] = log_b, state[SHIFT] = shift.a[m];
    state[INVERSE_CAP] = heads.head[0].inverse_cap();
    if (!(a < LARGEST_SUM && b < LARGEST_SUM)) results.to_redo.push_back(m);
  }
  return results;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> kl_fused(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& ref_x, const at::Tensor& ref_weight, const std::optional<at::Tensor>& ref_bias,
    const at::Tensor& targets, double scale, std::optional<double> softcap, double ref_scale,
    std::optional<double> ref_softcap, double beta, const std::optional<at::Tensor>& first,
    const std::optional<at::Tensor>& second, const std::optional<at::Tensor>& scales,
    const std::optional<at::Tensor>& ref_scales) {
  const at::Tensor at = targets.contiguous();
  const int64_t* target_ids = at.const_data_ptr<int64_t>();
  const Head a(x, weight, bias, scale, softcap, scales);
  const Head b(ref_x, ref_weight, ref_bias, ref_scale, ref_softcap, ref_scales);
  const Direction direction = direction_of(beta);
  TORCH_CHECK(direction != JSD, "expected beta 0 or 1, got ", beta);
  const Pair target{target_logits(a, target_ids), target_logits(b, target_ids)};
  Results results =
      run(pack(a, b), target_ids, target, target, direction, first, second);
  if (!results.to_redo.empty()) {
    const at::Tensor index = as_index(results.to_redo, at), some_at = at.index_select(0, index);
    const int64_t* some_target_ids = some_at.const_data_ptr<int64_t>();
    const Head some_a = a.at_rows(index), some_b = b.at_rows(index);
    const auto heads = pack(some_a, some_b);
    const auto block = [&](const std::optional<at::Tensor>& whole) {
      return whole ? std::optional(whole->new_empty({heads.V(), heads.M()}).t())
                   : std::nullopt;
    };
    const auto some_first = block(first), some_second = block(second);
    const auto top = largest_logits(heads);
    const Results redone = run(
        heads, some_target_ids,
        {target_logits(some_a, some_target_ids), target_logits(some_b, some_target_ids)},
        {top[0], top[1]}, direction, some_first, some_second);
    results.logp.index_copy_(0, index, redone.logp);
    results.ref_logp.index_copy_(0, index, redone.ref_logp);
    results.kl.index_copy_(0, index, redone.kl);
    results.state.index_copy_(0, index, redone.state);
    if (first) {
      at::Tensor(*first).index_copy_(0, index, *some_first);
      at::Tensor(*second).index_copy_(0, index, *some_second);
    }
  }
  return {results.logp, results.ref_logp, results.kl, results.state};
}

// Writes dZ of the columns that start at `start`, but zero at the targets, whose part the caller
// adds in float32; all blocks are (rows, columns), rows the fast dimension
void kl_combine(
    const at::Tensor& first, const at::Tensor& second, const at::Tensor& targets, int64_t start,
    const at::Tensor& kl, const at::Tensor& state, const at::Tensor& grad_logp,
    const at::Tensor& grad_kl, double beta, at::Tensor out) {
  const Direction direction = direction_of(beta);
  const int64_t M = out.size(0), columns = out.size(1), padded = ceil_div(M, 2 * LANES) * 2 * LANES;
  const at::Tensor rows = state.t().contiguous();  // (NUM_STATE, M)
  const auto lanes = [&](const at::Tensor& values) {
    const at::Tensor flat = values.contiguous();
    const float* data = flat.const_data_ptr<float>();
    return padded_copy(std::vector<float>(data, data + M), padded);
  };
  const auto log_a = lanes(rows.select(0, LOG_A)), log_b = lanes(rows.select(0, LOG_B));
  const auto shift = lanes(rows.select(0, SHIFT));
  const auto g_logp = lanes(grad_logp), g_kl = lanes(grad_kl), kls = lanes(kl);
  const float inverse_cap = M ? rows.select(0, INVERSE_CAP).const_data_ptr<float>()[0] : 0.f;
  const auto* from = first.const_data_ptr<at::BFloat16>();
  const auto* distance = second.const_data_ptr<at::Half>();
  auto* to = out.mutable_data_ptr<at::BFloat16>();
  const int64_t ld_from = first.stride(1), ld_distance = second.stride(1), ld_to = out.stride(1);
  const Vec zero(0.f), one(1.f), sign(-0.f);

  // LANES rows of dL/dz, for an entry that is not the target
  const auto gradient = [&](Vec larger, Vec d, int64_t m) {
    const Vec a_log = Vec::loadu(&log_a[m]), b_log = Vec::loadu(&log_b[m]);
    const Vec smaller = larger * (zero - d.abs()).exp_u20();
    const Vec policy_smaller = d > zero;  // e^b is the larger of the two
    const Vec p = Vec::blendv(larger, smaller, policy_smaller) * (zero - a_log).exp_u20();
    const Vec ratio = d - (b_log - a_log);  // log q - log p
    Vec kl_part;
    if (direction == REF_POLICY) {
      const Vec q = Vec::blendv(smaller, larger, policy_smaller) * (zero - b_log).exp_u20();
      const Vec loss = (zero - ratio.abs()).expm1();  // min / max of p and q, less 1
      kl_part = Vec::blendv(zero - p * loss, q * loss, ratio > zero);  // p - q
    } else {
      kl_part = zero - p * (ratio + Vec::loadu(&kls[m]));
    }
    Vec total = Vec::loadu(&g_kl[m]) * kl_part - Vec::loadu(&g_logp[m]) * p;
    if (inverse_cap != 0.f) {
      const Vec a = larger.log() - at::vec::maximum(d, zero) + Vec::loadu(&shift[m]);
      const Vec relative = at::vec::clamp(a * Vec(inverse_cap), Vec(-1.f), one);
      total = total * (one - relative * relative);
    }
    return total;
  };
  at::parallel_for(0, columns, 16, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v)
      for (int64_t m = 0; m < M; m += 2 * LANES) {
        const int64_t width = std::min(2 * LANES, M - m);
        const auto [e0, e1] =
            at::vec::convert_bfloat16_float(VecBf16::loadu(from + v * ld_from + m, width));
        const auto [d0, d1] =
            at::vec::convert_half_float(VecHalf::loadu(distance + v * ld_distance + m, width));
        at::vec::convert_float_bfloat16(gradient(e0, d0, m), gradient(e1, d1, m + LANES))
            .store(to + v * ld_to + m, width);
      }
  });

  const at::Tensor targets_here = targets.contiguous();
  const int64_t* target_ids = targets_here.const_data_ptr<int64_t>();
  for (int64_t m = 0; m < M; ++m) {
    const int64_t v = target_ids[m] - start;
    if (v >= 0 && v < columns) to[v * ld_to + m] = 0.f;
  }
}

}  // namespace sepo
