// Sums over segments on CUDA: raw pointers and a stream, no torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// No atomics: the same order of addition, and the same bits, in every run. Nothing waits.
extern "C" cudaError_t sepo_segment_sum(
    const void* values,      // (M,) float32 or float64
    int is_double,
    const int32_t* cu_rows,  // (S + 1,) from 0 to M
    void* sum,               // (S,) out, of the same dtype
    int64_t S, cudaStream_t stream);

extern "C" cudaError_t sepo_segment_sum_bwd(
    const void* grad_sum,    // (S,) float32 or float64
    int is_double,
    const int32_t* cu_rows,  // (S + 1,) from 0 to M
    void* grad_values,       // (M,) out, of the same dtype
    int64_t S, cudaStream_t stream);
