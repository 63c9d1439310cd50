// selected_logprob_kl from both heads' logits, which library GEMMs have written: one thread a
// row; sums in float64 from blocks of a row, so that near the reference the KL keeps its digits.
#include <algorithm>
#include <tuple>
#include <utility>

#include "divergence.h"
#include "head_rows.h"
#include "operators.h"

namespace sepo {
namespace {

template <typename T>
struct Sums {
  double a = 0, b = 0, weighted = 0;  // of e^a, of e^b, of (b - a) weighted with e^b or e^a
};

// weight * x, but 0 where the weight is 0, for an infinite x and for NaN too
template <typename T>
VecOf<T> weighed(const VecOf<T>& weight, const VecOf<T>& x) {
  const VecOf<T> zero(T(0));
  return VecOf<T>::blendv(weight * x, zero, weight == zero);
}

// z, ref_z (V,) finished logits, less their shifts c: nothing is written. MIXED: without `weighted`
template <bool MIXED, typename T>
Sums<T> sum_row(const T* z, const T* ref_z, int64_t V, T c, T ref_c, Direction direction) {
  Sums<T> total;
  for (int64_t start = 0; start < V; start += SUM_BLOCK) {
    VecOf<T> sum_a(T(0)), sum_b(T(0)), weighted(T(0));
    for (int64_t v = start; v < std::min(V, start + SUM_BLOCK); v += VecOf<T>::size()) {
      const int64_t width = std::min<int64_t>(VecOf<T>::size(), V - v);
      const VecOf<T> a = VecOf<T>::loadu(z + v, width) - VecOf<T>(c);
      const VecOf<T> b = VecOf<T>::loadu(ref_z + v, width) - VecOf<T>(ref_c);
      const VecOf<T> exp_a = a.exp(), exp_b = b.exp();
      sum_a = sum_a + only(exp_a, width);
      sum_b = sum_b + only(exp_b, width);
      if constexpr (MIXED) continue;
      // raw difference first: near the reference it is exact
      const VecOf<T> d = (VecOf<T>::loadu(ref_z + v, width) - VecOf<T>::loadu(z + v, width)) -
          VecOf<T>(ref_c - c);
      weighted = weighted + only(weighed<T>(direction == REF_POLICY ? exp_b : exp_a, d), width);
    }
    total.a += sum_lanes(sum_a), total.b += sum_lanes(sum_b), total.weighted += sum_lanes(weighted);
  }
  return total;
}

// z becomes -dlogp/dz and ref_z dKL/dz, but for the target; shift = ref_lse - lse, not rounded twice
template <typename T>
void dlogits_row(T* z, T* ref_z, int64_t V, T lse, T ref_lse, T shift, T kl, Direction direction,
               const Finish<T>& finish) {
  const VecOf<T> zero(T(0));
  for (int64_t v = 0; v < V; v += VecOf<T>::size()) {
    const int64_t width = std::min<int64_t>(VecOf<T>::size(), V - v);
    const VecOf<T> y = VecOf<T>::loadu(z + v, width);
    const VecOf<T> log_p = y - VecOf<T>(lse);
    const VecOf<T> ref_y = VecOf<T>::loadu(ref_z + v, width), log_q = ref_y - VecOf<T>(ref_lse);
    const VecOf<T> ratio = (ref_y - y) - VecOf<T>(shift);
    VecOf<T> p = log_p.exp(), grad;
    if (direction == REF_POLICY) {  // p - q, from the larger of both and their ratio
      const VecOf<T> loss = (zero - ratio.abs()).expm1();
      grad = VecOf<T>::blendv(zero - weighed<T>(p, loss), log_q.exp() * loss, ratio > zero);
    } else {
      grad = zero - weighed<T>(p, ratio + VecOf<T>(kl));
    }
    if (finish.softcap) {
      p = p * finish.derivative(y);
      grad = grad * finish.derivative(y);
    }
    p.store(z + v, width);
    grad.store(ref_z + v, width);
  }
}

// z becomes -dlogp/dz, but for the target, and ref_z log(p / m); returns JSD and KL(p || m)
template <typename T>
std::pair<double, double> mixture_row(
    T* z, T* ref_z, int64_t V, T lse, T ref_lse, T shift, const Mixture<T>& mixture,
    const Finish<T>& finish) {
  double jsd = 0, mean = 0;
  for (int64_t start = 0; start < V; start += SUM_BLOCK) {
    VecOf<T> sum(T(0)), weighted(T(0));
    for (int64_t v = start; v < std::min(V, start + SUM_BLOCK); v += VecOf<T>::size()) {
      const int64_t width = std::min<int64_t>(VecOf<T>::size(), V - v);
      const VecOf<T> y = VecOf<T>::loadu(z + v, width), ref_y = VecOf<T>::loadu(ref_z + v, width);
      const auto term =
          mixture(y - VecOf<T>(lse), ref_y - VecOf<T>(ref_lse), (ref_y - y) - VecOf<T>(shift));
      sum = sum + only(term.jsd, width);
      weighted = weighted + only(term.p * term.log_ratio, width);
      (finish.softcap ? term.p * finish.derivative(y) : term.p).store(z + v, width);
      term.log_ratio.store(ref_z + v, width);
    }
    jsd += sum_lanes(sum), mean += sum_lanes(weighted);
  }
  return {jsd < 0 ? 0 : jsd, mean};  // not a maximum, which would hide NaN
}

template <typename T, typename To>
void write(const T* from, To* to, int64_t V) {
  if constexpr (!std::is_same_v<T, To>) at::vec::map([](VecOf<T> x) { return x; }, to, from, V);
}

// Writes dJSD/dz of what mixture_row has left; rest = 1 - beta, and `to` may be ref_z
template <typename T, typename To>
void write_jsd(const T* z, const T* ref_z, To* to, int64_t V, T mean, T rest) {
  const auto of = [&](VecOf<T> p, VecOf<T> log_ratio) {
    return VecOf<T>(rest) * p * (log_ratio - VecOf<T>(mean));
  };
  if constexpr (std::is_same_v<T, To>) {
    at::vec::map2<T>(of, to, z, ref_z, V);
  } else {  // rounded at once: the row is read once less
    constexpr int64_t SIZE = VecOf<T>::size();
    for (int64_t v = 0; v < V; v += 2 * SIZE) {
      const auto some = [&](int64_t from) {
        const int64_t width = std::clamp<int64_t>(V - from, 0, SIZE);
        return of(VecOf<T>::loadu(z + from, width), VecOf<T>::loadu(ref_z + from, width));
      };
      at::vec::convert_from_float<To>(some(v), some(v + SIZE)).store(to + v, std::min(2 * SIZE, V - v));
    }
  }
}

template <typename T, typename To>
void do_rows(
    const at::Tensor& z, const at::Tensor& ref_z, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& ref_bias, const at::Tensor& targets, double scale,
    std::optional<double> softcap, double ref_scale, std::optional<double> ref_softcap,
    double beta, const std::optional<at::Tensor>& first, const std::optional<at::Tensor>& second,
    const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& ref_scales,
    at::Tensor& results) {
  const Finish<T> finish(bias, scale, softcap, scales);
  const Finish<T> ref_finish(ref_bias, ref_scale, ref_softcap, ref_scales);
  const Direction direction = direction_of(beta);
  const Mixture<T> mixture(beta);
  const int64_t M = z.size(0), V = z.size(1);
  T *logp = results.mutable_data_ptr<T>(), *ref_logp = logp + M, *kl = ref_logp + M;
  const int64_t* target = targets.const_data_ptr<int64_t>();
  at::parallel_for(0, M, 1, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      T *a = z.mutable_data_ptr<T>() + m * z.stride(0),
        *b = ref_z.mutable_data_ptr<T>() + m * ref_z.stride(0);
      const T c = finish(a, V, m), ref_c = ref_finish(b, V, m);
      const Sums<T> sums = direction == JSD ? sum_row<true>(a, b, V, c, ref_c, direction)
                                            : sum_row<false>(a, b, V, c, ref_c, direction);
      const double log_a = std::log(sums.a), log_b = std::log(sums.b), shift = log_b - log_a;
      const T at = a[target[m]];
      logp[m] = at - c - log_a;
      ref_logp[m] = b[target[m]] - ref_c - log_b;
      const T lse = c + log_a, ref_lse = ref_c + log_b;
      const T between = (double(ref_c) - double(c)) + shift;
      if (direction == JSD) {
        const auto [jsd, mean] = mixture_row<T>(a, b, V, lse, ref_lse, between, mixture, finish);
        kl[m] = jsd;
        if (!first) continue;
        write_jsd<T>(a, b, second->mutable_data_ptr<To>() + m * second->stride(0), V, mean, 1. - beta);
      } else {
        kl[m] = direction == REF_POLICY ? sums.weighted / sums.b - shift : shift - sums.weighted / sums.a;
        if (!first) continue;
        dlogits_row<T>(a, b, V, lse, ref_lse, between, kl[m], direction, finish);
        write(b, second->mutable_data_ptr<To>() + m * second->stride(0), V);
      }
      a[target[m]] = std::expm1(logp[m]) * finish.derivative(at);
      write(a, first->mutable_data_ptr<To>() + m * first->stride(0), V);
    }
  });
}

}  // namespace

at::Tensor kl_rows(
    const at::Tensor& z, const at::Tensor& ref_z, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& ref_bias, const at::Tensor& targets, double scale,
    std::optional<double> softcap, double ref_scale, std::optional<double> ref_softcap, double beta,
    const std::optional<at::Tensor>& first, const std::optional<at::Tensor>& second,
    const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& ref_scales) {
  const at::Tensor at = targets.contiguous();
  auto results = z.new_empty({3, z.size(0)});
  const auto to = first ? first->scalar_type() : z.scalar_type();
  const auto call = [&](auto kernel) {
    kernel(z, ref_z, bias, ref_bias, at, scale, softcap, ref_scale, ref_softcap, beta, first,
           second, scales, ref_scales, results);
  };
  if (z.scalar_type() == at::kDouble) {
    call(do_rows<double, double>);
  } else if (to == at::kFloat) {
    call(do_rows<float, float>);
  } else if (to == at::kBFloat16) {
    call(do_rows<float, at::BFloat16>);
  } else {
    call(do_rows<float, at::Half>);
  }
  return results;
}

namespace {

template <typename T, typename Acc>
void do_combine(const at::Tensor& first, const at::Tensor& second, const at::Tensor& grad_logp,
                const at::Tensor& grad_kl, at::Tensor& out) {
  const Acc *g_logp = grad_logp.const_data_ptr<Acc>(), *g_kl = grad_kl.const_data_ptr<Acc>();
  at::parallel_for(0, out.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const VecOf<Acc> of_first(-g_logp[m]), of_second(g_kl[m]);
      at::vec::map2<T>(
          [&](VecOf<Acc> a, VecOf<Acc> b) { return of_first * a + of_second * b; },
          out.mutable_data_ptr<T>() + m * out.stride(0),
          first.const_data_ptr<T>() + m * first.stride(0),
          second.const_data_ptr<T>() + m * second.stride(0), out.size(1));
    }
  });
}

}  // namespace

// out = -grad_logp * first + grad_kl * second, row by row, rounded once
void kl_combine_rows(
    const at::Tensor& first, const at::Tensor& second, const at::Tensor& grad_logp,
    const at::Tensor& grad_kl, at::Tensor out) {
  const auto call = [&](auto kernel) {
    kernel(first, second, grad_logp.contiguous(), grad_kl.contiguous(), out);
  };
  switch (out.scalar_type()) {
    case at::kDouble: return call(do_combine<double, double>);
    case at::kFloat: return call(do_combine<float, float>);
    case at::kBFloat16: return call(do_combine<at::BFloat16, float>);
    default: return call(do_combine<at::Half, float>);
  }
}

}  // namespace sepo
