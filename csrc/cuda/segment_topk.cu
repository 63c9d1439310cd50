// Segmented top-k % by radix selection: one block a segment, which is not copied.
//
// Pass after pass over 8 bits of the keys, from the top, a histogram narrows the K-th best key down
// to a prefix; then each warp writes the selected tokens of its own stretch, in order. The keys are
// recomputed in every pass: that costs a few instructions, and storing them would cost a workspace.
#include "segment_topk.h"

#include "../ordered_key.h"
#include "launch.h"

namespace {

using sepo::ALL_LANES;
using sepo::WARP;

constexpr int DIGIT = 8;
constexpr int BINS = 1 << DIGIT;
constexpr int MAX_THREADS = 1024;

struct Bin {
  unsigned digit;
  unsigned size;   // keys in it
  unsigned above;  // keys in higher bins
};

// The bin that holds the key of `rank`, counted from the best; called by one whole warp.
__device__ void find_bin(
    const unsigned* histogram,  // (BINS,)
    unsigned rank,              // 0 < rank <= the sum of the histogram
    Bin* bin                    // out, written by one lane
) {
  constexpr int EACH = BINS / WARP;
  const int lane = threadIdx.x % WARP;
  const int top = BINS - 1 - lane * EACH;  // lane 0 has the highest bins
  unsigned own = 0;
  for (int i = 0; i < EACH; ++i) own += histogram[top - i];
  unsigned upto = own;  // keys in the bins of this lane and of those before it
  for (int step = 1; step < WARP; step *= 2) {
    const unsigned before = __shfl_up_sync(ALL_LANES, upto, step);
    if (lane >= step) upto += before;
  }
  unsigned above = upto - own;
  if (above >= rank || upto < rank) return;
  unsigned digit = top;
  for (; above + histogram[digit] < rank; --digit) above += histogram[digit];
  *bin = {digit, histogram[digit], above};
}

// Of a warp's tokens, one a lane: which are above the prefix, and which are tied with it.
template <typename Bits>
struct Compared {
  unsigned above, tied;  // a bit a lane

  __device__ Compared(Bits key, bool inside, Bits mask, Bits prefix)
      : above(__ballot_sync(ALL_LANES, inside && (key & mask) > prefix)),
        tied(__ballot_sync(ALL_LANES, inside && (key & mask) == prefix)) {}
};

template <typename Bits>
__global__ void __launch_bounds__(MAX_THREADS) select_tokens(
    const Bits* __restrict__ score,         // (T_all,)
    const int32_t* __restrict__ cu_tokens,  // (S + 1,)
    const int32_t* __restrict__ cu_rows,    // (S + 1,)
    int32_t* __restrict__ index,            // (M,) out
    int side, Bits infinity) {
  __shared__ unsigned histogram[BINS];
  __shared__ Bin bin;
  __shared__ unsigned above_of[MAX_THREADS / WARP], tied_of[MAX_THREADS / WARP];

  const int segment = blockIdx.x;
  // unsigned: i + blockDim.x may pass 2**31 - 1 before the loop ends
  const unsigned start = cu_tokens[segment], T = cu_tokens[segment + 1] - start;
  const unsigned K = cu_rows[segment + 1] - cu_rows[segment];
  if (K == 0) return;
  score += start;
  index += cu_rows[segment];
  const bool highest = side == SEPO_HIGHEST || (side == SEPO_ALTERNATE && segment % 2 == 0);

  // Keys whose masked bits exceed prefix are selected; of those that equal it, the first `ties`.
  Bits mask = 0, prefix = 0;
  unsigned ties = K, tied = T;
  for (int shift = 8 * sizeof(Bits) - DIGIT; shift >= 0 && ties < tied; shift -= DIGIT) {
    for (int b = threadIdx.x; b < BINS; b += blockDim.x) histogram[b] = 0;
    __syncthreads();
#pragma unroll 4  // four loads on their way at once, or a long segment waits for each
    for (unsigned i = threadIdx.x; i < T; i += blockDim.x) {
      const Bits key = sepo::ordered_key(score[i], infinity, highest);
      if ((key & mask) == prefix) atomicAdd(&histogram[(key >> shift) & (BINS - 1)], 1u);
    }
    __syncthreads();
    if (threadIdx.x < WARP) find_bin(histogram, ties, &bin);
    __syncthreads();
    mask |= Bits(BINS - 1) << shift;
    prefix |= Bits(bin.digit) << shift;
    ties -= bin.above;
    tied = bin.size;
  }

  // Each warp has a stretch of its own: it counts it, adds up the stretches before, then writes it.
  const unsigned warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const unsigned rounds = (T + blockDim.x - 1) / blockDim.x;
  const unsigned first = warp * rounds * WARP + lane;
  const unsigned lanes_before = (1u << lane) - 1;
  const auto compare = [&](unsigned round) {
    const unsigned i = first + round * WARP;
    const Bits key = i < T ? sepo::ordered_key(score[i], infinity, highest) : Bits(0);
    return Compared<Bits>(key, i < T, mask, prefix);
  };
  unsigned above_before = 0, tied_before = 0;
#pragma unroll 4
  for (unsigned round = 0; round < rounds; ++round) {
    const Compared<Bits> lanes = compare(round);
    above_before += __popc(lanes.above);
    tied_before += __popc(lanes.tied);
  }
  if (lane == 0) {
    above_of[warp] = above_before;
    tied_of[warp] = tied_before;
  }
  __syncthreads();
  above_before = tied_before = 0;
  for (unsigned w = 0; w < warps; ++w) {
    above_before += w < warp ? above_of[w] : 0;
    tied_before += w < warp ? tied_of[w] : 0;
  }
#pragma unroll 4
  for (unsigned round = 0; round < rounds; ++round) {
    const Compared<Bits> lanes = compare(round);
    const unsigned tied_here = tied_before + __popc(lanes.tied & lanes_before);
    const bool is_tied = lanes.tied >> lane & 1, is_above = lanes.above >> lane & 1;
    if (is_above || (is_tied && tied_here < ties)) {
      const unsigned above_here = above_before + __popc(lanes.above & lanes_before);
      index[above_here + min(tied_here, ties)] = start + first + round * WARP;
    }
    above_before += __popc(lanes.above);
    tied_before += __popc(lanes.tied);
  }
}

template <typename Bits>
cudaError_t run(const void* score, const int32_t* cu_tokens, const int32_t* cu_rows, int32_t* index,
                int64_t T_all, int64_t S, int side, Bits infinity, cudaStream_t stream) {
  // wide blocks hide the latency of a long segment, and leave most threads of a short one idle
  const int threads = T_all / (S > 0 ? S : 1) > 2048 ? MAX_THREADS : 256;
  return sepo::launch(select_tokens<Bits>, int(S), threads, stream, static_cast<const Bits*>(score),
                      cu_tokens, cu_rows, index, side, infinity);
}

}  // namespace

extern "C" cudaError_t sepo_segment_topk(const void* score, int dtype, const int32_t* cu_tokens,
                                         const int32_t* cu_rows, int32_t* index, int64_t T_all,
                                         int64_t S, int side, cudaStream_t stream) {
  const auto with = [&](auto infinity) {
    return run(score, cu_tokens, cu_rows, index, T_all, S, side, infinity, stream);
  };
  switch (dtype) {
    case SEPO_FLOAT64: return with(uint64_t{0x7ff0000000000000});
    case SEPO_FLOAT32: return with(uint32_t{0x7f800000});
    case SEPO_FLOAT16: return with(uint16_t{0x7c00});
    case SEPO_BFLOAT16: return with(uint16_t{0x7f80});
    default: return cudaErrorInvalidValue;
  }
}
