"""selected_logprob_kl by the native CPU kernels of csrc/cpu.

bfloat16: both GEMMs, the log-sum-exps and the KL in one pass, the float32 logits never leave the
cache. The other dtypes, and bfloat16 without the instructions: library GEMMs, then row kernels.
"""

from typing import Any

import torch
from torch import Tensor

from sepo_kernels import extension, gemm
from sepo_kernels.scales import Scale, scale_arguments
from sepo_kernels.selected_logprob_kl.layout import REF_POLICY, is_jsd
from sepo_kernels.selected_logprob_kl.loops import LogitKernels

NUM_STATE = 5  # as csrc/cpu/selected_logprob_kl_fused.cpp has it
# evaluated once, at import: Dynamo traces why_not
_MISSING = extension.why_not("native_kl_rows", torch.device("cpu"))


def forward(
    x: Tensor,  # (chunk, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    ref_x: Tensor,  # (chunk, D_ref)
    ref_weight: Tensor,  # (V, D_ref)
    ref_bias: Tensor | None,  # (V,)
    targets: Tensor,  # (chunk,)
    scale: Scale,
    softcap: float | None,
    ref_scale: Scale,
    ref_softcap: float | None,
    beta: float,
    blocks: tuple[Tensor, Tensor] | None,  # (chunk, V) each, written: see csrc for what they hold
    logits: tuple[Tensor, Tensor] | None,  # (chunk, V) each, scratch; may be blocks; None if fused
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # logp, ref_logp, kl (chunk,), state (chunk, 5)
    (one, each), (ref_one, ref_each) = scale_arguments(scale), scale_arguments(ref_scale)
    settings = one, softcap, ref_one, ref_softcap, beta, *(blocks or (None, None)), each, ref_each
    if logits is None:
        return torch.ops.sepo.native_kl_fused(
            x, weight, bias, ref_x, ref_weight, ref_bias, targets, *settings
        )
    z, ref_z = logits
    gemm.logits(z, x, weight)
    gemm.logits(ref_z, ref_x, ref_weight)
    logp, ref_logp, kl = torch.ops.sepo.native_kl_rows(z, ref_z, bias, ref_bias, targets, *settings)
    return logp, ref_logp, kl, z.new_zeros((z.shape[0], NUM_STATE))


def recompute(*args: Any) -> None:
    """Write the blocks a second time; of loops.LogitKernels' arguments the last four are unread."""
    forward(*args[:-4])


def combine(
    first: Tensor,  # (chunk, columns)
    second: Tensor,  # (chunk, columns)
    targets: Tensor,  # (chunk,)
    start: int,
    logp: Tensor,  # (chunk,)
    kl: Tensor,  # (chunk,)
    state: Tensor,  # (chunk, 5)
    grad_logp: Tensor,  # (chunk,)
    grad_kl: Tensor,  # (chunk,)
    beta: float,
    out: Tensor,  # (chunk, columns), written
) -> None:
    if fused(out.dtype):
        torch.ops.sepo.native_kl_combine(
            first, second, targets, start, kl, state, grad_logp, grad_kl, beta, out
        )
    else:
        torch.ops.sepo.native_kl_combine_rows(first, second, grad_logp, grad_kl, out)


def why_not(hidden: Tensor, weight: Tensor, beta: float = REF_POLICY) -> str | None:
    if hidden.device.type != "cpu":
        return f"expected tensors on a CPU, got {hidden.device}"
    # a word's part needs both log-sum-exps, which a single pass over tiles has at its end
    if is_jsd(beta) and fused(hidden.dtype):
        return 'its bfloat16 tiles have no direction ("jsd", beta)'
    return _MISSING


def fused(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and extension.BFLOAT16_TILES


def second_dtype(dtype: torch.dtype) -> torch.dtype:
    # float16: a difference of logits, of which the digits count and not the range
    return torch.float16 if fused(dtype) else dtype


KERNELS = LogitKernels(forward, recompute, combine, NUM_STATE, fused, second_dtype)
