// Every operator of csrc/cpu, as operators.cpp registers it: native_<name>, with its schema.
//
// Operations include this and torch's narrow headers only: <torch/library.h> and <ATen/ATen.h>
// take a compiler longer than most kernels do.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace sepo {

using at::Tensor;
using Maybe = std::optional<at::Tensor>;

bool bfloat16_tiles();
void bfloat16_logits(Tensor out, const Tensor& x, const Tensor& weight);
Tensor split_linear(const Tensor& x, const Tensor& hi, const Maybe& lo, const Maybe& bias);

Tensor segment_topk(
    const Tensor& score, const Tensor& cu_tokens, const Tensor& cu_rows, int64_t side, int64_t M);
Tensor segment_sum(const Tensor& values, const Tensor& cu_rows);
Tensor segment_sum_bwd(const Tensor& grad_sum, const Tensor& cu_rows, int64_t M);

std::tuple<Tensor, Tensor, Tensor> logprob_fused(
    const Tensor& x, const Tensor& weight, const Maybe& bias, const Tensor& targets, double scale,
    std::optional<double> softcap, const Maybe& dlogits, const Maybe& scales);
std::tuple<Tensor, Tensor, Tensor> logprob_rows(
    const Tensor& z, const Maybe& bias, const Tensor& targets, double scale,
    std::optional<double> softcap, const Maybe& dlogits, const Maybe& scales);

Tensor stats_fused(
    const Tensor& x, const Tensor& weight, const Maybe& bias, const Tensor& targets, double scale,
    std::optional<double> softcap, const Maybe& dlogits, const Maybe& logits, const Maybe& scales);
void stats_gradient(
    const Tensor& logits, int64_t start, std::optional<double> softcap, const Tensor& targets,
    const Tensor& numbers, Tensor out);
void stats_recompute(
    const Tensor& x, const Tensor& weight, const Maybe& bias, double scale,
    std::optional<double> softcap, const Tensor& targets, const Tensor& numbers, Tensor out,
    const Maybe& scales);
Tensor stats_rows(
    const Tensor& z, const Maybe& bias, const Tensor& targets, double scale,
    std::optional<double> softcap, const Maybe& dlogits, const Maybe& scales);
void stats_gradient_rows(
    Tensor z, int64_t start, const Maybe& bias, double scale, std::optional<double> softcap,
    bool finished, const Tensor& targets, const Tensor& numbers, Tensor out, const Maybe& scales);

std::tuple<Tensor, Tensor, Tensor, Tensor> kl_fused(
    const Tensor& x, const Tensor& weight, const Maybe& bias, const Tensor& ref_x,
    const Tensor& ref_weight, const Maybe& ref_bias, const Tensor& targets, double scale,
    std::optional<double> softcap, double ref_scale, std::optional<double> ref_softcap, double beta,
    const Maybe& first, const Maybe& second, const Maybe& scales, const Maybe& ref_scales);
void kl_combine(
    const Tensor& first, const Tensor& second, const Tensor& targets, int64_t start,
    const Tensor& kl, const Tensor& state, const Tensor& grad_logp, const Tensor& grad_kl,
    double beta, Tensor out);
Tensor kl_rows(
    const Tensor& z, const Tensor& ref_z, const Maybe& bias, const Maybe& ref_bias,
    const Tensor& targets, double scale, std::optional<double> softcap, double ref_scale,
    std::optional<double> ref_softcap, double beta, const Maybe& first, const Maybe& second,
    const Maybe& scales, const Maybe& ref_scales);
void kl_combine_rows(
    const Tensor& first, const Tensor& second, const Tensor& grad_logp, const Tensor& grad_kl,
    Tensor out);

Tensor target_dots(
    const Tensor& hidden, const Tensor& weight, const Tensor& rows, const Tensor& targets);
Tensor target_sums(const Tensor& coefficient, const Tensor& weight, const Tensor& targets);
void target_add(
    Tensor grad_weight, const Tensor& coefficient, const Tensor& hidden, const Tensor& rows,
    const Tensor& sorted, const Tensor& order);

std::tuple<Tensor, Tensor> packed_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& spans, double scale,
    int64_t window, bool bfloat16_tiles);
std::tuple<Tensor, Tensor, Tensor> packed_attention_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& out, const Tensor& lse, const Tensor& spans, double scale, int64_t window,
    bool bfloat16_tiles);

}  // namespace sepo
