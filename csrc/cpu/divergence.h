// Which divergence of two heads is asked for: KL in either direction.
#pragma once

#include <cstdint>

namespace sepo {

// By the reference's weight beta in the mixture m = (1 - beta) p + beta q, of which they are limits
enum Direction : int64_t { REF_POLICY = 0, POLICY_REF = 1 };

inline Direction direction_of(double beta) { return beta == 0. ? REF_POLICY : POLICY_REF; }

}  // namespace sepo
