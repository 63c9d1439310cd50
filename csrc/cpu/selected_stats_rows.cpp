// selected_stats from logits that a library GEMM has written: one thread a row. And the gradient of
// the entropy from them.
#include "logprob_row.h"
#include "operators.h"

namespace sepo {
namespace {

enum Number : int64_t {
  LOGP, LSE, ROW_SCALE, ENTROPY, LOG_SUM_SQ, MEAN_LOGIT, TOP1, REFERENCE, LOG_SUM, NUMBERS
};

// Sums e y and e^2 of all entries but the target's, y = z - top and e = e^y
template <typename T>
struct Statistics {
  VecOf<T> block_weighted{T(0)}, block_squares{T(0)};
  double weighted = 0, squares = 0;

  void add(VecOf<T> y, VecOf<T> e, int64_t width) {
    // finite, so that 0 log 0 = 0
    const VecOf<T> finite = at::vec::maximum(y, VecOf<T>(T(-1024)));
    block_weighted = block_weighted + only(e * finite, width);
    block_squares = block_squares + only(e * e, width);
  }
  void end_block() {
    const VecOf<T> zero(T(0));
    weighted += sum_lanes(block_weighted), block_weighted = zero;
    squares += sum_lanes(block_squares), block_squares = zero;
  }
};

template <typename T>
double sum_of(const T* z, int64_t V) {
  double total = 0;
  for (int64_t start = 0; start < V; start += SUM_BLOCK) {
    VecOf<T> sum(T(0));
    for (int64_t v = start; v < std::min(V, start + SUM_BLOCK); v += VecOf<T>::size()) {
      const int64_t width = std::min<int64_t>(VecOf<T>::size(), V - v);
      sum = sum + only(VecOf<T>::loadu(z + v, width), width);
    }
    total += sum_lanes(sum);
  }
  return total;
}

// whether z[target] is the first of the largest
template <typename T>
bool is_first(const T* z, int64_t target, T top) {
  if (z[target] != top) return false;
  bool before = false;
  for (int64_t v = 0; v < target; ++v) before |= z[v] == top;
  return !before;
}

template <typename T, typename To>
void do_rows(
    const at::Tensor& z, const Finish<T>& finish, const at::Tensor& targets,
    const std::optional<at::Tensor>& dlogits, at::Tensor& results) {
  const int64_t M = z.size(0), V = z.size(1), stride = z.stride(0);
  const int64_t dlogits_stride = dlogits ? dlogits->stride(0) : 0;
  T *at = z.mutable_data_ptr<T>(), *numbers = results.mutable_data_ptr<T>();
  To* to = dlogits ? dlogits->mutable_data_ptr<To>() : nullptr;
  const int64_t* target = targets.const_data_ptr<int64_t>();
  at::parallel_for(0, M, 1, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      T* row = at + m * stride;
      const T top = finish(row, V, m), at_target = row[target[m]];
      const bool first = is_first(row, target[m], top);
      const double mean = sum_of(row, V) / V;
      Statistics<T> more;
      const Row r = do_row<T, To>(
          row, to ? to + m * dlogits_stride : nullptr, V, top, target[m], finish, more);
      const double own = std::exp(r.distance), sum = r.tail + own;
      const bool is_top = r.distance == 0.;
      const double log_sum = is_top ? std::log1p(r.tail) : std::log(sum);
      const double weighted = more.weighted + (own > 0. ? own * r.distance : 0.);
      const double log_squares =
          is_top ? std::log1p(more.squares) : std::log(more.squares + own * own);
      const auto write = [&](Number which, double value) { numbers[which * M + m] = value; };
      write(LOGP, r.logp), write(LSE, r.lse);
      write(ROW_SCALE, to ? r.row_scale : 1. / sum);
      write(ENTROPY, log_sum - weighted / sum);  // both terms are positive
      write(LOG_SUM_SQ, log_squares - 2. * log_sum);
      write(MEAN_LOGIT, mean), write(TOP1, first);
      write(REFERENCE, top), write(LOG_SUM, log_sum);
      if (!to) row[target[m]] = at_target;
    }
  });
}

template <typename T>
VecOf<T> where_not_zero(const VecOf<T>& weight, const VecOf<T>& x) {
  const VecOf<T> zero(T(0));
  return VecOf<T>::blendv(weight * x, zero, weight == zero);
}

template <typename T, typename To>
void do_gradient(
    at::Tensor& z, int64_t start, const Finish<T>& finish, bool finished,
    const at::Tensor& targets, const at::Tensor& numbers, at::Tensor& out) {
  const int64_t M = out.size(0), columns = out.size(1);
  const T *logp = numbers.const_data_ptr<T>(), *entropy = logp + M, *reference = entropy + M,
          *row_scale = reference + M, *grad_logp = row_scale + M, *grad_entropy = grad_logp + M;
  const int64_t* target = targets.const_data_ptr<int64_t>();
  at::parallel_for(0, M, 1, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      T* row = z.mutable_data_ptr<T>() + m * z.stride(0);
      To* to = out.mutable_data_ptr<To>() + m * out.stride(0);
      if (!finished) finish(row, columns, m);
      const int64_t own = target[m] - start;
      const bool inside = own >= 0 && own < columns;
      // by expm1, which keeps the digits of a confident row; and 0 log 0 = 0
      const T p_target = std::exp(logp[m]), g = grad_logp[m], h = grad_entropy[m];
      const T of_entropy = p_target > T(0) ? p_target * (logp[m] + entropy[m]) : T(0);
      const T at_target = inside ? row[own] : T(0);  // before it is overwritten
      const T entry = -(g * std::expm1(logp[m]) + h * of_entropy) * finish.derivative(at_target);
      const VecOf<T> c(reference[m]), scale(row_scale[m]), of_logp(g), weight(h);
      const VecOf<T> log_part(std::log(row_scale[m]) + entropy[m]);
      at::vec::map(
          [&](VecOf<T> y) {
            const VecOf<T> shifted = y - c, p = shifted.exp() * scale;
            const VecOf<T> factor = weight * (shifted + log_part) + of_logp;
            VecOf<T> dz = VecOf<T>(T(0)) - where_not_zero<T>(p, factor);
            if (finish.softcap) dz = dz * finish.derivative(y);
            return dz;
          },
          to, row, columns);
      if (inside) to[own] = entry;
    }
  });
}

}  // namespace

at::Tensor stats_rows(
    const at::Tensor& z, const std::optional<at::Tensor>& bias, const at::Tensor& targets,
    double scale, std::optional<double> softcap, const std::optional<at::Tensor>& dlogits,
    const std::optional<at::Tensor>& scales) {
  const at::Tensor at = targets.contiguous();
  auto results = z.new_empty({NUMBERS, z.size(0)});
  const auto to = dlogits ? dlogits->scalar_type() : z.scalar_type();
  if (z.scalar_type() == at::kDouble) {
    do_rows<double, double>(z, {bias, scale, softcap, scales}, at, dlogits, results);
  } else {
    const Finish<float> finish(bias, scale, softcap, scales);
    const auto call = [&](auto kernel) { kernel(z, finish, at, dlogits, results); };
    if (to == at::kFloat) call(do_rows<float, float>);
    else if (to == at::kBFloat16) call(do_rows<float, at::BFloat16>);
    else call(do_rows<float, at::Half>);
  }
  return results;
}

void stats_gradient_rows(
    at::Tensor z, int64_t start, const std::optional<at::Tensor>& bias, double scale,
    std::optional<double> softcap, bool finished, const at::Tensor& targets,
    const at::Tensor& numbers, at::Tensor out, const std::optional<at::Tensor>& scales) {
  const at::Tensor at = targets.contiguous(), rows = numbers.contiguous();
  if (z.scalar_type() == at::kDouble) {
    const Finish<double> finish(bias, scale, softcap, scales);
    return do_gradient<double, double>(z, start, finish, finished, at, rows, out);
  }
  const Finish<float> finish(bias, scale, softcap, scales);
  const auto call = [&](auto kernel) { kernel(z, start, finish, finished, at, rows, out); };
  switch (out.scalar_type()) {
    case at::kFloat: return call(do_gradient<float, float>);
    case at::kBFloat16: return call(do_gradient<float, at::BFloat16>);
    default: return call(do_gradient<float, at::Half>);
  }
}

}  // namespace sepo
