// Unsigned keys that rank floating-point scores: the higher key is the better score.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SEPO_HOST_DEVICE __host__ __device__
#else
#define SEPO_HOST_DEVICE
#endif

namespace sepo {

// Works on the bits, so that float16 and bfloat16 differ in `infinity` alone. Both zeros get one
// key, a tie. A NaN gets 0, below every number on both sides.
template <typename Bits>
SEPO_HOST_DEVICE inline Bits ordered_key(
    Bits bits,
    Bits infinity,  // the bits of +infinity: what lies above them without the sign is a NaN
    bool highest    // else the lowest score is the best
) {
  constexpr int top = 8 * sizeof(Bits) - 1;
  constexpr Bits sign = Bits(1) << top;
  const Bits magnitude = bits & Bits(~sign);
  bits = magnitude == 0 ? Bits(0) : bits;
  // negative numbers fall as their bits rise: flip them all; of the others flip the sign alone
  const Bits flip = Bits(Bits(0) - Bits(bits >> top)) | sign;
  const Bits side = highest ? Bits(0) : Bits(~Bits(0));
  return magnitude > infinity ? Bits(0) : Bits(bits ^ flip ^ side);
}

}  // namespace sepo
