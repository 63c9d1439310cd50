// segment_topk on CUDA: raw pointers and a stream, no torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

enum SepoDtype { SEPO_FLOAT64 = 0, SEPO_FLOAT32 = 1, SEPO_FLOAT16 = 2, SEPO_BFLOAT16 = 3 };
enum SepoSide { SEPO_HIGHEST = 0, SEPO_LOWEST = 1, SEPO_ALTERNATE = 2 };  // even segments highest

// Deterministic, needs no workspace, waits for nothing. A segment may have any length.
extern "C" cudaError_t sepo_segment_topk(
    const void* score,         // (T_all,) of dtype
    int dtype,                 // SepoDtype
    const int32_t* cu_tokens,  // (S + 1,) from 0 to T_all
    const int32_t* cu_rows,    // (S + 1,) from 0 to M, and no segment selects more than it has
    int32_t* index,            // (M,) out, ascending in each segment
    int64_t T_all,             // decides the size of the blocks, nothing else
    int64_t S,
    int side,  // SepoSide
    cudaStream_t stream);
