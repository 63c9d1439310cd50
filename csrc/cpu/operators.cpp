// The schemas of all operators and their kernels for the CPU; csrc/cuda adds its own to some.
#include "operators.h"

#include "../segment_schemas.h"

#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(sepo, m) {
  // scales, of a head: (M,) float32 or float64, one a row in the place of `scale`
  m.def("native_bfloat16_tiles() -> bool", &sepo::bfloat16_tiles);
  // out (M, V) float32, its rows contiguous, is written with x weight.T of bfloat16 numbers
  m.def("native_bfloat16_logits(Tensor(a!) out, Tensor x, Tensor weight) -> ()");
  // x (N, D) and bias (V,) float32, hi and lo (V, D) bfloat16
  m.def("native_split_linear(Tensor x, Tensor hi, Tensor? lo, Tensor? bias) -> Tensor");
  sepo::define_segment_operators(m);
  // writes dlogits (M, V), its rows the fast dimension: dlogits / row_scale of loops.py, zero at
  // the targets
  m.def(
      "native_logprob_fused(Tensor x, Tensor weight, Tensor? bias, Tensor targets, float scale,"
      " float? softcap, Tensor(a!)? dlogits, Tensor? scales=None)"
      " -> (Tensor logp, Tensor lse, Tensor row_scale)");
  // beta 0: KL(ref||policy), 1: KL(policy||ref); first, second (M, V) with the rows as their fast
  // dimension, bfloat16 and float16, are written for combine
  m.def(
      "native_kl_fused(Tensor x, Tensor weight, Tensor? bias, Tensor ref_x, Tensor ref_weight,"
      " Tensor? ref_bias, Tensor targets, float scale, float? softcap, float ref_scale,"
      " float? ref_softcap, float beta, Tensor(a!)? first, Tensor(b!)? second, Tensor? scales=None,"
      " Tensor? ref_scales=None)"
      " -> (Tensor logp, Tensor ref_logp, Tensor kl, Tensor state)");
  m.def(
      "native_kl_combine(Tensor first, Tensor second, Tensor targets, int start,"
      " Tensor kl, Tensor state, Tensor grad_logp, Tensor grad_kl, float beta, Tensor(a!) out)"
      " -> ()");
  // z, ref_z (M, V) float32 or float64 GEMMs, overwritten; first, second (M, V), which may be they,
  // are written with -dlogp/dz and dKL/dz; returns logp, ref_logp and KL (3, M)
  m.def(
      "native_kl_rows(Tensor(a!) z, Tensor(b!) ref_z, Tensor? bias, Tensor? ref_bias, Tensor targets,"
      " float scale, float? softcap, float ref_scale, float? ref_softcap, float beta,"
      " Tensor(c!)? first, Tensor(d!)? second, Tensor? scales=None, Tensor? ref_scales=None)"
      " -> Tensor");
  // z (M, V) float32 or float64 GEMM, overwritten; dlogits (M, V), which may be z, is written with
  // dlogits / row_scale of loops.py
  m.def(
      "native_logprob_rows(Tensor(a!) z, Tensor? bias, Tensor targets, float scale, float? softcap,"
      " Tensor(b!)? dlogits, Tensor? scales=None) -> (Tensor logp, Tensor lse, Tensor row_scale)");
  // numbers (9, M) as loops.py of selected_stats has them. dlogits as of
  // native_logprob_fused; logits (M, V) float32, its rows the fast dimension, are kept if given
  m.def(
      "native_stats_fused(Tensor x, Tensor weight, Tensor? bias, Tensor targets, float scale,"
      " float? softcap, Tensor(a!)? dlogits, Tensor(b!)? logits, Tensor? scales=None)"
      " -> Tensor numbers");
  // rows (6, M): logp, entropy, reference, row_scale and the gradients of logp and entropy
  m.def(
      "native_stats_gradient(Tensor logits, int start, float? softcap, Tensor targets, Tensor rows,"
      " Tensor(a!) out) -> ()");
  m.def(
      "native_stats_recompute(Tensor x, Tensor weight, Tensor? bias, float scale, float? softcap,"
      " Tensor targets, Tensor rows, Tensor(a!) out, Tensor? scales=None) -> ()");
  // z (M, V) float32 or float64 GEMM, overwritten with finished logits, or with dlogits
  m.def(
      "native_stats_rows(Tensor(a!) z, Tensor? bias, Tensor targets, float scale, float? softcap,"
      " Tensor(b!)? dlogits, Tensor? scales=None) -> Tensor numbers");
  m.def(
      "native_stats_gradient_rows(Tensor(a!) z, int start, Tensor? bias, float scale,"
      " float? softcap, bool finished, Tensor targets, Tensor rows, Tensor(b!) out,"
      " Tensor? scales=None) -> ()");
  m.def(
      "native_kl_combine_rows(Tensor first, Tensor second, Tensor grad_logp, Tensor grad_kl,"
      " Tensor(a!) out) -> ()");
  // targets (M, K) int64 and coefficient (M, K) float32 or float64; a target outside of [0, V) is
  // absent; target_add adds coefficient * hidden[rows] to the targets' rows of grad_weight
  m.def("native_target_dots(Tensor hidden, Tensor weight, Tensor rows, Tensor targets) -> Tensor");
  m.def("native_target_sums(Tensor coefficient, Tensor weight, Tensor targets) -> Tensor");
  m.def(
      "native_target_add(Tensor(a!) grad_weight, Tensor coefficient, Tensor hidden, Tensor rows,"
      " Tensor sorted, Tensor order) -> ()");
  // query (N, H, d), key and value (N, H_kv, d), float32 or bfloat16; spans (P, 4) int64 on the
  // CPU: start, prefix_end, rejected_start, pair_end of pairs that fill the buffer; window 0: none;
  // bfloat16_tiles: oneDNN multiplies them here, else they are widened
  m.def(
      "native_packed_attention(Tensor query, Tensor key, Tensor value, Tensor spans, float scale,"
      " int window, bool bfloat16_tiles) -> (Tensor out, Tensor lse)");
  m.def(
      "native_packed_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value,"
      " Tensor out, Tensor lse, Tensor spans, float scale, int window, bool bfloat16_tiles)"
      " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
}
TORCH_LIBRARY_IMPL(sepo, CPU, m) {
  m.impl("native_bfloat16_logits", &sepo::bfloat16_logits);
  m.impl("native_split_linear", &sepo::split_linear);
  m.impl("native_segment_topk", &sepo::segment_topk);
  m.impl("native_segment_sum", &sepo::segment_sum);
  m.impl("native_segment_sum_bwd", &sepo::segment_sum_bwd);
  m.impl("native_logprob_fused", &sepo::logprob_fused);
  m.impl("native_logprob_rows", &sepo::logprob_rows);
  m.impl("native_stats_fused", &sepo::stats_fused);
  m.impl("native_stats_gradient", &sepo::stats_gradient);
  m.impl("native_stats_recompute", &sepo::stats_recompute);
  m.impl("native_stats_rows", &sepo::stats_rows);
  m.impl("native_stats_gradient_rows", &sepo::stats_gradient_rows);
  m.impl("native_kl_fused", &sepo::kl_fused);
  m.impl("native_kl_combine", &sepo::kl_combine);
  m.impl("native_kl_rows", &sepo::kl_rows);
  m.impl("native_kl_combine_rows", &sepo::kl_combine_rows);
  m.impl("native_target_dots", &sepo::target_dots);
  m.impl("native_target_sums", &sepo::target_sums);
  m.impl("native_target_add", &sepo::target_add);
  m.impl("native_packed_attention", &sepo::packed_attention);
  m.impl("native_packed_attention_backward", &sepo::packed_attention_backward);
}
