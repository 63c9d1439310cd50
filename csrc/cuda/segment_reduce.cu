// Sums over segments, one block each: every thread adds its own values, a fixed tree adds threads.
// In double for any input dtype: there are few values, and they add up to a loss.
#include "segment_reduce.h"

#include "launch.h"

namespace {

using sepo::ALL_LANES;
using sepo::WARP;

constexpr int THREADS = 256;

__device__ double sum_of_warp(double value) {  // valid in lane 0
  for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_down_sync(ALL_LANES, value, step);
  return value;
}

template <typename T>
__global__ void __launch_bounds__(THREADS) sum_segments(
    const T* __restrict__ values,         // (M,)
    const int32_t* __restrict__ cu_rows,  // (S + 1,)
    T* __restrict__ sum                   // (S,) out
) {
  __shared__ double of_warp[THREADS / WARP];
  const unsigned start = cu_rows[blockIdx.x], stop = cu_rows[blockIdx.x + 1];
  double own = 0;
  for (unsigned i = start + threadIdx.x; i < stop; i += THREADS) own += values[i];
  own = sum_of_warp(own);
  if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = own;
  __syncthreads();
  if (threadIdx.x >= WARP) return;
  own = sum_of_warp(threadIdx.x < THREADS / WARP ? of_warp[threadIdx.x] : 0.0);
  if (threadIdx.x == 0) sum[blockIdx.x] = static_cast<T>(own);
}

template <typename T>
__global__ void __launch_bounds__(THREADS) spread_segments(
    const T* __restrict__ grad_sum,       // (S,)
    const int32_t* __restrict__ cu_rows,  // (S + 1,)
    T* __restrict__ grad_values           // (M,) out
) {
  const unsigned start = cu_rows[blockIdx.x], stop = cu_rows[blockIdx.x + 1];
  const T grad = grad_sum[blockIdx.x];
  for (unsigned i = start + threadIdx.x; i < stop; i += THREADS) grad_values[i] = grad;
}

template <typename T>
cudaError_t start(void (*kernel)(const T*, const int32_t*, T*), const void* in,
                  const int32_t* cu_rows, void* out, int64_t S, cudaStream_t stream) {
  return sepo::launch(kernel, int(S), THREADS, stream, static_cast<const T*>(in), cu_rows,
                      static_cast<T*>(out));
}

}  // namespace

extern "C" cudaError_t sepo_segment_sum(const void* values, int is_double, const int32_t* cu_rows,
                                        void* sum, int64_t S, cudaStream_t stream) {
  return is_double ? start(sum_segments<double>, values, cu_rows, sum, S, stream)
                   : start(sum_segments<float>, values, cu_rows, sum, S, stream);
}

extern "C" cudaError_t sepo_segment_sum_bwd(const void* grad_sum, int is_double,
                                            const int32_t* cu_rows, void* grad_values, int64_t S,
                                            cudaStream_t stream) {
  return is_double ? start(spread_segments<double>, grad_sum, cu_rows, grad_values, S, stream)
                   : start(spread_segments<float>, grad_sum, cu_rows, grad_values, S, stream);
}
