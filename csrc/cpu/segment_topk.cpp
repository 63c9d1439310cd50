// segment_topk on the CPU: the K-th best key of each segment by bisection, then one ordered pass.
//
// Bisection counts keys a whole vector at a time, without order, copy or pivot: it takes at most as
// many passes as a key has bits, whatever the data, and about half of them as a rule. A sort or
// nth_element spends its time on mispredicted branches.
#include <ATen/Parallel.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <vector>

#include "../ordered_key.h"
#include "operators.h"

namespace sepo {
namespace {

constexpr int64_t LINE = 64;           // keys counted at once; the buffer is padded to a multiple
constexpr int64_t GRAIN = 1 << 15;     // tokens a thread takes at least
constexpr int64_t MAX_LINES = 0xffff;  // a 16-bit count holds as many

template <typename Bits>
int64_t count_from(
    const Bits* key,  // (T,), 0 from T to the next multiple of LINE
    int64_t T,
    Bits bound  // > 0, so that the padding is not counted
) {
  int64_t total = 0;
  for (int64_t start = 0; start < T; start += LINE * MAX_LINES) {
    Bits count[LINE] = {};  // as wide as the keys: the compiler keeps it in vector registers
    const int64_t stop = std::min(T, start + LINE * MAX_LINES);
    for (int64_t line = start; line < stop; line += LINE) {
      for (int64_t i = 0; i < LINE; ++i) count[i] += key[line + i] >= bound;
    }
    for (int64_t i = 0; i < LINE; ++i) total += count[i];
  }
  return total;
}

#ifdef __AVX512F__
inline __m512i load(const uint32_t* key) { return _mm512_loadu_si512(key); }
inline __m512i load(const uint16_t* key) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(key)));
}
#endif

// Writes the tokens of [i, stop) whose keys are at least `bound`; returns how many are written now.
template <typename Bits>
int64_t write_from(
    const Bits* key,
    int64_t i,
    int64_t stop,
    Bits bound,
    int64_t start,  // of the segment
    int64_t n,      // written before
    int64_t K,      // nothing is written behind the K-th, where another thread's segment begins
    int32_t* index  // (K,) out
) {
#ifdef __AVX512F__
  if constexpr (sizeof(Bits) <= 4) {
    const __m512i bounds = _mm512_set1_epi32(static_cast<int>(bound));
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; n + 16 <= K && i + 16 <= stop; i += 16) {
      const __m512i token = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(start + i)), lane);
      const __mmask16 chosen = _mm512_cmpge_epu32_mask(load(key + i), bounds);
      _mm512_storeu_si512(index + n, _mm512_maskz_compress_epi32(chosen, token));
      n += __builtin_popcount(chosen);
    }
  }
#endif
  // writes every token and moves on after a chosen one: no branch to mispredict
  for (; n < K && i < stop; ++i) {
    index[n] = static_cast<int32_t>(start + i);
    n += key[i] >= bound;
  }
  return n;
}

template <typename Bits>
void select(
    const Bits* key,  // (T,), padded
    int64_t T,
    int64_t K,      // 0 < K <= T
    int64_t start,  // of the segment
    int32_t* index  // (K,) out, ascending
) {
  // count_from(low) >= K > count_from(high + 1), until low is the K-th best key or splits exactly
  Bits low = 0, high = Bits(~Bits(0));
  int64_t count = T;
  while (low < high && count != K) {
    const Bits middle = Bits(low + Bits(high - low) / 2 + 1);
    const int64_t from_middle = count_from(key, T, middle);
    if (from_middle >= K) {
      low = middle;
      count = from_middle;
    } else {
      high = Bits(middle - 1);
    }
  }
  // the surplus are ties at low, of which the later ones are left out
  int64_t tie_stop = T;
  for (int64_t surplus = count - K; surplus > 0;) surplus -= key[--tie_stop] == low;
  const int64_t n = write_from(key, 0, tie_stop, low, start, 0, K, index);
  // no key is all ones, which are a NaN's bits: low + 1 does not wrap
  write_from(key, tie_stop, T, Bits(low + 1), start, n, K, index);
}

template <typename Bits>
void run(
    const void* score,         // (T_all,)
    const int32_t* cu_tokens,  // (S + 1,)
    const int32_t* cu_rows,    // (S + 1,)
    int64_t S,
    int64_t side,  // 0 highest, 1 lowest, 2 even segments highest and odd ones lowest
    Bits infinity,
    int32_t* index  // (M,) out
) {
  // threads share the tokens, not the segments, whose lengths differ: each takes the segments that
  // begin in its part
  at::parallel_for(0, cu_tokens[S], GRAIN, [&](int64_t begin, int64_t end) {
    std::vector<Bits> key;
    int64_t s = std::lower_bound(cu_tokens, cu_tokens + S, begin) - cu_tokens;
    for (; s < S && cu_tokens[s] < end; ++s) {
      const int64_t start = cu_tokens[s], T = cu_tokens[s + 1] - start;
      const int64_t K = cu_rows[s + 1] - cu_rows[s];
      if (K == 0) continue;
      const int64_t padded = (T + LINE - 1) / LINE * LINE;
      if (static_cast<int64_t>(key.size()) < padded) key.resize(padded);
      const Bits* bits = static_cast<const Bits*>(score) + start;
      const bool highest = side == 0 || (side == 2 && s % 2 == 0);
      for (int64_t i = 0; i < T; ++i) key[i] = ordered_key(bits[i], infinity, highest);
      std::fill(key.begin() + T, key.begin() + padded, Bits(0));
      select(key.data(), T, K, start, index + cu_rows[s]);
    }
  });
}

}  // namespace

at::Tensor segment_topk(  // (M,) int32
    const at::Tensor& score,      // (T_all,) contiguous
    const at::Tensor& cu_tokens,  // (S + 1,) int32 contiguous, from 0 to T_all
    const at::Tensor& cu_rows,    // (S + 1,) int32 contiguous, from 0 to M
    int64_t side,
    int64_t M) {
  TORCH_CHECK_VALUE(
      score.dim() == 1 && score.is_contiguous() && cu_tokens.is_contiguous() &&
          cu_rows.is_contiguous() && cu_tokens.dim() == 1 && cu_tokens.numel() > 0 &&
          cu_rows.sizes() == cu_tokens.sizes() && cu_tokens.scalar_type() == at::kInt &&
          cu_rows.scalar_type() == at::kInt,
      "expected contiguous score (T_all,) and int32 cu_tokens, cu_rows (S + 1,), got ",
      score.sizes(), ", ", cu_tokens.sizes(), " ", cu_tokens.scalar_type(), ", ", cu_rows.sizes(),
      " ", cu_rows.scalar_type());
  const int64_t S = cu_tokens.numel() - 1;
  const int32_t* tokens = cu_tokens.const_data_ptr<int32_t>();
  const int32_t* rows = cu_rows.const_data_ptr<int32_t>();
  TORCH_CHECK_VALUE(
      tokens[0] == 0 && tokens[S] == score.numel() && rows[0] == 0 && rows[S] == M,
      "expected offsets from 0 to ", score.numel(), " and to ", M, ", got ", tokens[0], " to ",
      tokens[S], " and ", rows[0], " to ", rows[S]);
  for (int64_t s = 0; s < S; ++s) {
    const int64_t T = int64_t(tokens[s + 1]) - tokens[s], K = int64_t(rows[s + 1]) - rows[s];
    TORCH_CHECK_VALUE(0 <= K && K <= T, "expected 0 <= K <= T, got K = ", K, " and T = ", T,
                      " in segment ", s);
  }
  at::Tensor index = cu_rows.new_empty({M});
  const void* data = score.const_data_ptr();
  int32_t* out = index.mutable_data_ptr<int32_t>();
  switch (score.scalar_type()) {
    case at::kDouble: run<uint64_t>(data, tokens, rows, S, side, 0x7ff0000000000000, out); break;
    case at::kFloat: run<uint32_t>(data, tokens, rows, S, side, 0x7f800000, out); break;
    case at::kHalf: run<uint16_t>(data, tokens, rows, S, side, 0x7c00, out); break;
    case at::kBFloat16: run<uint16_t>(data, tokens, rows, S, side, 0x7f80, out); break;
    default: TORCH_CHECK_VALUE(false, "expected a floating-point score, got ", score.scalar_type());
  }
  return index;
}

}  // namespace sepo
