// The operators that have a kernel on both devices. Each of the two libraries defines them, if the other
// has not: either can be built and loaded alone.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace sepo {

inline void define_segment_operators(torch::Library& m) {
  if (c10::Dispatcher::singleton().findSchema({"sepo::native_segment_topk", ""})) return;
  m.def(
      "native_segment_topk(Tensor score, Tensor cu_tokens, Tensor cu_rows, int side, int M)"
      " -> Tensor");
  m.def("native_segment_sum(Tensor values, Tensor cu_rows) -> Tensor");
  m.def("native_segment_sum_bwd(Tensor grad_sum, Tensor cu_rows, int M) -> Tensor");
}

}  // namespace sepo
