// The log-probability of one row of logits, and the sums of e^(z - top) on the way.
#pragma once

#include <algorithm>

#include "head_rows.h"

namespace sepo {

// What is summed beside e = e^(z - top): nothing. Others have the same functions
template <typename T>
struct NothingMore {
  void add(VecOf<T>, VecOf<T>, int64_t) {}
  void end_block() {}
};

// Sums exp(z - c); overwrites z with exp(z - c) * cap'(z) if WRITE_DLOGITS
template <typename T, bool WRITE_DLOGITS, typename More>
double exponentials(T* z, int64_t V, T c, const Finish<T>& finish, More& more) {
  const VecOf<T> reference(c);
  double total = 0;  // of blocks: the fewer lanes a vector has, the longer the sum in each
  for (int64_t start = 0; start < V; start += SUM_BLOCK) {
    VecOf<T> sum(T(0));
    for (int64_t v = start; v < std::min(V, start + SUM_BLOCK); v += VecOf<T>::size()) {
      const int64_t width = std::min<int64_t>(VecOf<T>::size(), V - v);
      const VecOf<T> y = VecOf<T>::loadu(z + v, width);
      VecOf<T> e = (y - reference).exp();
      sum = sum + only(e, width);
      more.add(y - reference, e, width);
      if constexpr (WRITE_DLOGITS) {
        if (finish.softcap) e = e * finish.derivative(y);
        e.store(z + v, width);
      }
    }
    total += sum_lanes(sum);
    more.end_block();
  }
  return total;
}

struct Row {
  double logp, lse, row_scale;
  double tail, distance;  // the sum but for the target's share, and that one's logit less the top
};

// Computes a row from finished z (V,) and its largest logit, overwritten; dlogits (V,) or null, or z
template <typename T, typename To, typename More>
Row do_row(T* z, To* dlogits, int64_t V, T top, int64_t target, const Finish<T>& finish, More& more) {
  const T at_target = z[target], distance = at_target - top;
  z[target] = -std::numeric_limits<T>::infinity();  // summed apart: see logp below
  const double others = dlogits ? exponentials<T, true>(z, V, top, finish, more)
                                : exponentials<T, false>(z, V, top, finish, more);
  const T tail = others;
  const T sum = tail + std::exp(distance);
  // log1p keeps the relative precision of a row that is sure of its target
  const T logp = distance == T(0) ? -std::log1p(tail) : distance - std::log(sum);
  T row_scale(1);
  if (dlogits) {
    const T entry = -tail * finish.derivative(at_target);
    if (static_cast<void*>(dlogits) == static_cast<void*>(z)) {
      z[target] = entry;
      row_scale = T(1) / sum;
    } else if constexpr (!std::is_same_v<T, To>) {
      const VecOf<T> factor(T(1) / sum);
      z[target] = entry;
      at::vec::map([factor](VecOf<T> e) { return e * factor; }, dlogits, z, V);
    }
  }
  return {logp, at_target - logp, row_scale, others, distance};
}

}  // namespace sepo
