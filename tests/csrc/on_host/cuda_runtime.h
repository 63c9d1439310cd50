// Runs CUDA kernels on a CPU, so that a machine without a GPU can test them: found before CUDA's
// own cuda_runtime.h, it lets a C++ compiler read a .cu file. Only what the kernels use is there.
//
// A block is a set of fibres on one thread of the machine, each running until it meets the others:
// its block at __syncthreads, its warp at a shuffle or a ballot. Where the turns begin is drawn at
// random, so that a missing barrier gives a wrong result instead of a lucky one.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // one block at a time; what the last block left there is not cleared
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace on_host {

constexpr unsigned WARP = 32;
constexpr size_t STACK = 1 << 16;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "on_host: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

struct Fibre {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(STACK);
  enum { READY, AT_BLOCK, AT_WARP, DONE } state;
  unsigned exchanges;  // shuffles and ballots so far
};

inline std::vector<Fibre> fibres;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline uint32_t seed = 1;
// what each thread offers to its warp; two turns, as a fast lane may be one exchange ahead
inline uint64_t offered[2][1024];

inline void run_body() {
  body();
  fibres[threadIdx.x].state = Fibre::DONE;
}

inline void wait(decltype(Fibre::state) state) {
  Fibre& me = fibres[threadIdx.x];
  me.state = state;
  swapcontext(&me.context, &scheduler);
}

// Lets every thread in [begin, end) go on if all of them wait for `state`.
inline void release(unsigned begin, unsigned end, decltype(Fibre::state) state) {
  const auto waits = [&](const Fibre& fibre) { return fibre.state == state; };
  if (!std::all_of(fibres.begin() + begin, fibres.begin() + end, waits)) return;
  for (unsigned t = begin; t < end; ++t) fibres[t].state = Fibre::READY;
}

inline void run_block() {
  const unsigned threads = blockDim.x;
  for (unsigned t = 0; t < threads; ++t) {
    Fibre& fibre = fibres[t];
    fibre.state = Fibre::READY;
    fibre.exchanges = 0;
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.data();
    fibre.context.uc_stack.ss_size = STACK;
    fibre.context.uc_link = &scheduler;
    makecontext(&fibre.context, run_body, 0);
  }
  for (unsigned done = 0; done < threads;) {
    bool moved = false;
    done = 0;
    seed = seed * 1664525u + 1013904223u;
    const unsigned first_warp = seed >> 16, first_lane = seed >> 24;
    for (unsigned w = 0; w < threads / WARP; ++w) {
      const unsigned begin = (first_warp + w) % (threads / WARP) * WARP;
      for (unsigned l = 0; l < WARP; ++l) {
        const unsigned t = begin + (first_lane + l) % WARP;
        if (fibres[t].state == Fibre::READY) {
          threadIdx.x = t;
          swapcontext(&scheduler, &fibres[t].context);
          moved = true;
        }
        done += fibres[t].state == Fibre::DONE;
      }
      release(begin, begin + WARP, Fibre::AT_WARP);
    }
    release(0, threads, Fibre::AT_BLOCK);
    if (!moved && done < threads) fail("some threads wait at a barrier the others never reach");
  }
}

// Offers `mine` to the warp and waits until every lane has; returns what the lanes offered.
inline const uint64_t* exchange(unsigned mask, uint64_t mine) {
  if (mask != 0xffffffffu) fail("only whole warps are supported");
  const unsigned turn = fibres[threadIdx.x].exchanges++ % 2;
  offered[turn][threadIdx.x] = mine;
  wait(Fibre::AT_WARP);
  return offered[turn] + threadIdx.x / WARP * WARP;
}

template <typename T>
T shuffle(unsigned mask, T value, unsigned lane) {  // of another lane, or the own outside the warp
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::copy_n(reinterpret_cast<const char*>(&value), sizeof(T), reinterpret_cast<char*>(&bits));
  const uint64_t* all = exchange(mask, bits);
  const uint64_t* from = all + (lane < WARP ? lane : threadIdx.x % WARP);
  std::copy_n(reinterpret_cast<const char*>(from), sizeof(T), reinterpret_cast<char*>(&value));
  return value;
}

}  // namespace on_host

inline void __syncthreads() { on_host::wait(on_host::Fibre::AT_BLOCK); }

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  const uint64_t* all = on_host::exchange(mask, vote);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < on_host::WARP; ++lane) votes |= unsigned(all[lane]) << lane;
  return votes;
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by) {
  return on_host::shuffle(mask, value, threadIdx.x % on_host::WARP - by);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  return on_host::shuffle(mask, value, threadIdx.x % on_host::WARP + by);
}

inline unsigned atomicAdd(unsigned* at, unsigned by) {
  const unsigned before = *at;
  *at += by;
  return before;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  if (blockDim.x % on_host::WARP || blockDim.x > 1024) on_host::fail("odd block size");
  on_host::fibres.resize(blockDim.x);
  on_host::body = [=] { kernel(arguments...); };
  for (unsigned block = 0; block < gridDim.x; ++block) {
    blockIdx.x = block;
    on_host::run_block();
  }
  return cudaSuccess;
}
