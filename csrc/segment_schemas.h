// The operators that have a kernel on both devices. Each of the two libraries defines those that the other
// has not: either can be built and loaded alone.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <utility>

namespace sepo {

inline void define_segment_operators(torch::Library& m) {
  const std::pair<const char*, const char*> operators[] = {
      {"sepo::native_segment_topk",
       "native_segment_topk(Tensor score, Tensor cu_tokens, Tensor cu_rows, int side, int M)"
       " -> Tensor"},
      {"sepo::native_segment_sum", "native_segment_sum(Tensor values, Tensor cu_rows) -> Tensor"},
      {"sepo::native_segment_sum_bwd",
       "native_segment_sum_bwd(Tensor grad_sum, Tensor cu_rows, int M) -> Tensor"},
  };
  for (const auto& [name, schema] : operators) {
    if (!c10::Dispatcher::singleton().findSchema({name, ""})) m.def(schema);
  }
}

}  // namespace sepo
