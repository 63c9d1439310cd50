"""selected_logprob_kl by the native CPU kernels of csrc/cpu.

bfloat16: both GEMMs, the log-sum-exps and the KL in one pass, the float32 logits never leave the
cache. The other dtypes, bfloat16 without the instructions, and the Jensen-Shannon divergence, of
which a word's part needs both log-sum-exps: GEMMs, then row kernels.
"""

from typing import Any

import torch
from torch import Tensor

from sepo_kernels import extension, gemm
from sepo_kernels.scales import Scale, of_part, scale_arguments
from sepo_kernels.schedules import parts
from sepo_kernels.selected_logprob_kl.layout import is_jsd
from sepo_kernels.selected_logprob_kl.loops import LogitKernels

# of bfloat16 whose logits are in memory at once: a new page costs more than to read the weight again
ROWS_OF_TILES = 128
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
    if logits is None:
        settings = _settings(scale, softcap, ref_scale, ref_softcap, beta, blocks)
        return torch.ops.sepo.native_kl_fused(
            x, weight, bias, ref_x, ref_weight, ref_bias, targets, *settings
        )
    z, ref_z = logits
    tiles = _has_tiles(x.dtype)
    product = torch.ops.sepo.native_bfloat16_logits if tiles else gemm.logits
    numbers = []
    for part in parts(0, len(x), ROWS_OF_TILES if tiles else max(1, len(x))):
        a, b = z[: part.stop - part.start], ref_z[: part.stop - part.start]
        product(a, x[part], weight)
        product(b, ref_x[part], ref_weight)
        of_rows = None if blocks is None else (blocks[0][part], blocks[1][part])
        scales = of_part(scale, part), softcap, of_part(ref_scale, part), ref_softcap
        settings = _settings(*scales, beta, of_rows)
        numbers += [torch.ops.sepo.native_kl_rows(a, b, bias, ref_bias, targets[part], *settings)]
    logp, ref_logp, kl = torch.cat(numbers, 1) if numbers else z.new_empty((3, 0))
    return logp, ref_logp, kl, z.new_zeros((z.shape[0], NUM_STATE))


def _settings(
    scale: Scale,
    softcap: float | None,
    ref_scale: Scale,
    ref_softcap: float | None,
    beta: float,
    blocks: tuple[Tensor, Tensor] | None,
) -> tuple[Any, ...]:
    """Return what both operators take after their tensors."""
    (one, each), (ref_one, ref_each) = scale_arguments(scale), scale_arguments(ref_scale)
    return one, softcap, ref_one, ref_softcap, beta, *(blocks or (None, None)), each, ref_each


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
    if fused(out.dtype, beta):
        torch.ops.sepo.native_kl_combine(
            first, second, targets, start, kl, state, grad_logp, grad_kl, beta, out
        )
    else:
        torch.ops.sepo.native_kl_combine_rows(first, second, grad_logp, grad_kl, out)


def why_not(hidden: Tensor, *_: Any) -> str | None:
    if hidden.device.type != "cpu":
        return f"expected tensors on a CPU, got {hidden.device}"
    return _MISSING


def fused(dtype: torch.dtype, beta: float) -> bool:
    return _has_tiles(dtype) and not is_jsd(beta)


def second_dtype(dtype: torch.dtype, beta: float) -> torch.dtype:
    # float16: a difference of logits, of which the digits count and not the range
    return torch.float16 if fused(dtype, beta) else dtype


def _has_tiles(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and extension.BFLOAT16_TILES


KERNELS = LogitKernels(forward, recompute, combine, NUM_STATE, fused, second_dtype)
