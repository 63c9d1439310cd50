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

#include "logprob_tiles.h"
#include "operators.h"

namespace sepo {
namespace {

// dlogits: (M, V) with the rows as its fast dimension, or undefined
Logprobs run(
    const Heads<1>& heads, const int64_t* targets, const std::vector<float>& target,
    const std::vector<float>& c, const at::Tensor& dlogits) {
  const TargetIndex index(targets, heads.M(), heads.V());
  Block out;
  if (dlogits.defined())
    out = {dlogits.mutable_data_ptr<at::BFloat16>(), nullptr, dlogits.stride(1)};
  const auto pass = out.dlogits ? sum_pass<Write::DLOGITS, false> : sum_pass<Write::NOTHING, false>;
  return logprobs(heads, targets, target, c, pass(heads, index, targets, c, out, nullptr), out);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> logprob_fused(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& targets, double scale, std::optional<double> softcap,
    const std::optional<at::Tensor>& dlogits, const std::optional<at::Tensor>& scales) {
  const at::Tensor at = targets.contiguous(), out = dlogits.value_or(at::Tensor());
  const Head head(x, weight, bias, scale, softcap, scales);
  const auto target = target_logits(head, at.const_data_ptr<int64_t>());
  Logprobs results = run(pack(head), at.const_data_ptr<int64_t>(), target, target, out);
  if (!results.to_redo.empty()) {
    const at::Tensor index = as_index(results.to_redo, at), some_at = at.index_select(0, index);
    const Head some = head.at_rows(index);
    const auto heads = pack(some);
    const at::Tensor some_out =
        dlogits ? out.new_empty({heads.V(), heads.M()}).t() : at::Tensor();
    const int64_t* some_targets = some_at.const_data_ptr<int64_t>();
    const Logprobs redone = run(heads, some_targets, target_logits(some, some_targets),
                                largest_logits(heads)[0], some_out);
    results.logp.index_copy_(0, index, redone.logp);
    results.lse.index_copy_(0, index, redone.lse);
    results.row_scale.index_copy_(0, index, redone.row_scale);
    if (dlogits) out.index_copy_(0, index, some_out);
  }
  return {results.logp, results.lse, results.row_scale};
}

}  // namespace sepo
