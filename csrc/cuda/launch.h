// One way to start a kernel: without <<<>>>, which only nvcc can read, so that tests/csrc can also
// compile these files with a C++ compiler and run them on a CPU.
#pragma once

#include <cuda_runtime.h>

namespace sepo {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int blocks, int threads, cudaStream_t stream,
                   Arguments... arguments) {
  if (blocks == 0) return cudaSuccess;  // a grid of none is an error to CUDA
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace sepo
