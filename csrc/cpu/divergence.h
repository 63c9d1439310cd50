// Which divergence of two heads is asked for, and what a word adds to the Jensen-Shannon one.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <limits>

namespace sepo {

// By the reference's weight beta in the mixture m = (1 - beta) p + beta q: between 0 and 1 it is
// beta KL(q || m) + (1 - beta) KL(p || m), at its ends KL(q || p) and KL(p || q)
enum Direction : int64_t { REF_POLICY = 0, POLICY_REF = 1, JSD = 2 };

inline Direction direction_of(double beta) {
  return beta == 0. ? REF_POLICY : beta == 1. ? POLICY_REF : JSD;
}

// What words add, one a lane of V
template <typename V>
struct MixtureTerm {
  V p;          // the policy's probability
  V log_ratio;  // log(p / m)
  V jsd;
};

// With s = smaller / larger of p and q, and c the smaller one's weight in m, m / larger is
// 1 - c + c s and a word adds larger (c phi(s) - phi(1 - c + c s)), phi(x) = x log x: positive, flat
// at s = 1, and finite for any gap
template <typename T>
class Mixture {
 public:
  using V = at::vec::Vectorized<T>;
  explicit Mixture(double beta) : of_q_(T(beta)), of_p_(T(1. - beta)) {}

  // of log p, log q, and their difference log q - log p, which knows more than they do
  MixtureTerm<V> operator()(V log_p, V log_q, V difference) const {
    const V zero(T(0)), largest(T(60000));  // beyond, the smaller is zero all the same
    const V larger = at::vec::maximum(log_p, log_q).exp();
    // NaN where both heads rule a word out: it has no weight there, and may be 0
    const V ratio =
        V::blendv(at::vec::clamp(difference, zero - largest, largest), zero, larger == zero);
    const V distance = ratio.abs(), policy_smaller = ratio > zero;
    const V smaller = (zero - distance).exp();  // relative to the larger, as m is
    const V c = V::blendv(of_q_, of_p_, policy_smaller);
    const V rest = V::blendv(of_p_, of_q_, policy_smaller);
    // a weight may have been rounded to 0
    const V m = at::vec::maximum(rest + c * smaller, V(std::numeric_limits<T>::min()));
    // log m = -log1p((1 - m) / m), which has the digits of both ends: m near 1, and m near 0
    const V log_m = zero - (zero - c * (zero - distance).expm1() / m).log1p();
    return {V::blendv(larger, larger * smaller, policy_smaller),
            zero - (log_m + at::vec::maximum(ratio, zero)),
            larger * (zero - (m * log_m + c * smaller * distance))};
  }

 private:
  const V of_q_, of_p_;
};

}  // namespace sepo
