// selected_stats for bfloat16: the pass of selected_logprob, and in it the sums of the statistics;
// and the gradient of the entropy, from logits that were kept or are computed once more.
//
// With e_v = exp(y_v), y_v = z_v - c, S the sum of e_v, and W that of e_v y_v:
//
//   entropy = log S - W / S      log sum p^2 = log(sum of e_v^2) - 2 log S
//
// A row's references are below 2^60 of its sum, so no e_v^2 overflows. The target is left out and
// added in float64, for the digits of a confident row.

#include <tuple>

#include "logprob_tiles.h"
#include "operators.h"

namespace sepo {
namespace {

enum Number : int64_t {
  LOGP, LSE, ROW_SCALE, ENTROPY, LOG_SUM_SQ, MEAN_LOGIT, TOP1, REFERENCE, LOG_SUM, NUMBERS
};

struct Results {
  at::Tensor numbers;            // (NUMBERS, M) float32
  std::vector<int64_t> to_redo;  // rows whose sum is too large for their c
};

Results run(
    const Heads<1>& heads, const int64_t* targets, const std::vector<float>& target,
    const std::vector<float>& c, const Block& out) {
  const int64_t M = heads.M(), V = heads.V();
  const TargetIndex index(targets, M, V);
  Statistics more(heads.groups(), heads.padded(), M);
  const auto pass = out.dlogits ? sum_pass<Write::DLOGITS, true>
      : out.logits              ? sum_pass<Write::LOGITS, true>
                                : sum_pass<Write::NOTHING, true>;
  const Partial tails = pass(heads, index, targets, c, out, &more);
  Logprobs found = logprobs(heads, targets, target, c, tails, out);
  Results results{heads.floats({NUMBERS, M}), std::move(found.to_redo)};
  results.numbers.select(0, LOGP).copy_(found.logp);
  results.numbers.select(0, LSE).copy_(found.lse);
  results.numbers.select(0, ROW_SCALE).copy_(found.row_scale);
  float* numbers = results.numbers.mutable_data_ptr<float>();
  for (int64_t m = 0; m < M; ++m) {
    const auto number = [&](Number which) -> float& { return numbers[which * M + m]; };
    const double tail = tails.sum(m), distance = target[m] - c[m], own = std::exp(distance);
    const bool is_reference = distance == 0.;
    const double log_sum = is_reference ? std::log1p(tail) : std::log(tail + own);
    const double weighted = more.weighted.sum(m) + (own > 0. ? own * distance : 0.);
    const double squares = more.squares.sum(m);
    const double entropy = log_sum - weighted / (tail + own);
    number(ENTROPY) = entropy < 0. ? 0. : entropy;
    number(LOG_SUM_SQ) =
        (is_reference ? std::log1p(squares) : std::log(squares + own * own)) - 2. * log_sum;
    number(MEAN_LOGIT) = (more.total.sum(m) - (c[m] - FAR) + target[m]) / V;
    number(TOP1) = more.is_first(m, targets[m], heads.groups());
    number(REFERENCE) = c[m];
    number(LOG_SUM) = log_sum;
  }
  return results;
}

at::Tensor none() { return at::Tensor(); }

Block block_of(const at::Tensor& dlogits, const at::Tensor& logits) {
  if (dlogits.defined())
    return {dlogits.mutable_data_ptr<at::BFloat16>(), nullptr, dlogits.stride(1)};
  if (logits.defined()) return {nullptr, logits.mutable_data_ptr<float>(), logits.stride(1)};
  return {};
}

}  // namespace

at::Tensor stats_fused(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& targets, double scale, std::optional<double> softcap,
    const std::optional<at::Tensor>& dlogits, const std::optional<at::Tensor>& logits,
    const std::optional<at::Tensor>& scales) {
  const at::Tensor at = targets.contiguous(), out = dlogits.value_or(none());
  const int64_t* ids = at.const_data_ptr<int64_t>();
  const Head head(x, weight, bias, scale, softcap, scales);
  const auto target = target_logits(head, ids);
  Results results = run(pack(head), ids, target, target, block_of(out, logits.value_or(none())));
  if (!results.to_redo.empty()) {  // their logits are right already
    const at::Tensor index = as_index(results.to_redo, at), some_at = at.index_select(0, index);
    const int64_t* some_ids = some_at.const_data_ptr<int64_t>();
    const Head some = head.at_rows(index);
    const auto heads = pack(some);
    const at::Tensor some_out = dlogits ? out.new_empty({heads.V(), heads.M()}).t() : none();
    const Results redone = run(heads, some_ids, target_logits(some, some_ids),
                               largest_logits(heads)[0], block_of(some_out, none()));
    results.numbers.index_copy_(1, index, redone.numbers);
    if (dlogits) out.index_copy_(0, index, some_out);
  }
  return results.numbers;
}

namespace {

// What the gradient reads of each row, padded to whole vectors: p = e^(z - reference) row_scale
class RowLanes {
 public:
  // numbers (6, M): logp, entropy, reference, row_scale, grad_logp, grad_entropy
  RowLanes(const at::Tensor& numbers, int64_t padded, std::optional<double> softcap)
      : inverse_cap_(softcap ? 1.f / static_cast<float>(*softcap) : 0.f) {
    const at::Tensor flat = numbers.contiguous();
    const float* data = flat.const_data_ptr<float>();
    const int64_t M = flat.size(1);
    const auto lanes = [&](int64_t which) {
      const float* row = data + which * M;
      return padded_copy(std::vector<float>(row, row + M), padded);
    };
    reference_ = lanes(2), row_scale_ = lanes(3), grad_logp_ = lanes(4), grad_entropy_ = lanes(5);
    log_part_ = lanes(1);
    for (int64_t m = 0; m < M; ++m) log_part_[m] += std::log(row_scale_[m]);
  }

  // dL/dz of LANES rows from m on, for entries that are no targets
  Vec gradient(Vec z, int64_t m) const {
    const Vec shifted = z - Vec::loadu(&reference_[m]);
    const Vec p = shifted.exp_u20() * Vec::loadu(&row_scale_[m]);
    const Vec finite = at::vec::maximum(shifted, Vec(LOWEST));
    const Vec factor = at::vec::fmadd(
        Vec::loadu(&grad_entropy_[m]), finite + Vec::loadu(&log_part_[m]),
        Vec::loadu(&grad_logp_[m]));
    Vec dz = Vec(0.f) - p * factor;
    if (inverse_cap_ != 0.f) {
      const Vec relative = z * Vec(inverse_cap_);
      dz = dz * (Vec(1.f) - relative * relative);
    }
    return dz;
  }

 private:
  float inverse_cap_;
  std::vector<float> log_part_, reference_, row_scale_, grad_logp_, grad_entropy_;
};

}  // namespace

// Writes dZ of the columns that start at `start`, but zero at the targets, whose part the caller
// adds in float32; both blocks are (rows, columns), rows the fast dimension
void stats_gradient(
    const at::Tensor& logits, int64_t start, std::optional<double> softcap,
    const at::Tensor& targets, const at::Tensor& numbers, at::Tensor out) {
  const int64_t M = out.size(0), columns = out.size(1);
  const int64_t ld = logits.stride(1), ld_out = out.stride(1);
  const RowLanes rows(numbers, ceil_div(M, 2 * LANES) * 2 * LANES, softcap);
  const float* z = logits.const_data_ptr<float>();
  auto* to = out.mutable_data_ptr<at::BFloat16>();
  at::parallel_for(0, columns, 16, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v)
      for (int64_t m = 0; m < M; m += 2 * LANES) {
        const int64_t width = std::min(2 * LANES, M - m);
        const Vec z0 = Vec::loadu(z + v * ld + m, std::min(LANES, width));
        const Vec z1 = width > LANES ? Vec::loadu(z + v * ld + m + LANES, width - LANES) : z0;
        at::vec::convert_float_bfloat16(rows.gradient(z0, m), rows.gradient(z1, m + LANES))
            .store(to + v * ld_out + m, width);
      }
  });
  const at::Tensor at = targets.contiguous();
  const int64_t* ids = at.const_data_ptr<int64_t>();
  for (int64_t m = 0; m < M; ++m)
    if (ids[m] >= start && ids[m] < start + columns) to[(ids[m] - start) * ld_out + m] = 0.f;
}

// The same for all columns, from the logits computed once more
void stats_recompute(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    double scale, std::optional<double> softcap, const at::Tensor& targets,
    const at::Tensor& numbers, at::Tensor out, const std::optional<at::Tensor>& scales) {
  const Head head(x, weight, bias, scale, softcap, scales);
  const auto heads = pack(head);
  const RowLanes rows(numbers, heads.padded(), softcap);
  auto* to = out.mutable_data_ptr<at::BFloat16>();
  const int64_t M = heads.M(), ld = out.stride(1);
  for_each_tile(heads, [&](int64_t, int64_t v0, int64_t count, int64_t block, Tile* tiles) {
    const int64_t m0 = block * TILE_M, in_block = heads.rows[0].block_rows(block);
    for (int64_t lane = 0; lane < in_block; lane += 2 * LANES) {
      const int64_t m = m0 + lane, width = std::min(2 * LANES, in_block - lane);
      for (int64_t v = 0; v < count; ++v) {
        const float* z = tiles[0] + v * TILE_M + lane;
        at::vec::convert_float_bfloat16(
            rows.gradient(Vec::loadu(z), m), rows.gradient(Vec::loadu(z + LANES), m + LANES))
            .store(to + (v0 + v) * ld + m, width);
      }
    }
  });
  const at::Tensor at = targets.contiguous();
  const int64_t* ids = at.const_data_ptr<int64_t>();
  for (int64_t m = 0; m < M; ++m) to[ids[m] * ld + m] = 0.f;
}

}  // namespace sepo
