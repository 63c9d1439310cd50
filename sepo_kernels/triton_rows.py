"""Launching the Triton row kernels of the heads, and the parts that they share.

All compute in float32 from float32 logits. A kernel either walks its row with one program, or gives
every tile of every row a program. Each treats whole tiles and the last, narrower one apart: the
whole ones have no mask, so that their loads and stores are of 16 bytes whatever V is. No atomics:
each output element has one writer, each sum one order.

Imported at the first launch, because the operations work without triton too.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sepo_kernels.configs import CONFIGS
from sepo_kernels.scales import Scale

# arguments that Triton must not specialise on: one compilation serves all values of V (whose last
# tile is narrower than 1 in 16 of most rows) and of flags, and any alignment of one number a row
UNSPECIALISED = {
    "do_not_specialize": [
        "V", "has_bias", "has_ref_bias", "has_scales", "has_ref_scales", "column", "num_rows",
    ],
    "do_not_specialize_on_alignment": [
        "targets_ptr", "logp_ptr", "ref_logp_ptr", "lse_ptr", "reference_ptr", "row_scale_ptr",
        "kl_ptr", "state_ptr", "grad_logp_ptr", "grad_kl_ptr", "scales_ptr",
        "ref_scales_ptr", "numbers_ptr", "entropy_ptr", "grad_entropy_ptr",
    ],
}  # fmt: skip
# finite: in a tile of nothing but -inf (a padded vocabulary's bias), e^(-inf - top) = 0 needs a top
LOWEST = tl.constexpr(-3.4028234663852886e38)
# of a row's exponentials relative to its target's. Beyond it the target's share is below 2^-60, and
# the row is redone relative to its largest logit; below it nothing overflows float32 or bfloat16
LARGEST_SUM = tl.constexpr(2.0**60)


def launch(
    kernel: Any,  # one of configs.CONFIGS
    rows: int,
    columns: int | None,  # None: the kernel walks its row itself
    *args: Any,
    **flags: bool,
) -> None:
    """Run `kernel` on its `args`, one program a row or a tile of every row."""
    config = CONFIGS[kernel.fn.__name__]
    assert set(flags) == set(config.flags), f"{kernel.fn.__name__}: {flags}"
    grid = (rows,) if columns is None else (rows, triton.cdiv(columns, config.BLOCK_V))
    if 0 in grid:
        return
    # Triton launches on the current device, which need not be the tensors'
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **flags, BLOCK_V=config.BLOCK_V, num_warps=config.num_warps)


def bias_argument(
    bias: Tensor | None,  # (V,)
    logits: Tensor,  # (rows, V) float32
) -> Tensor:  # (V,) float32
    """Return the bias as the kernels take it; without one, a tensor that they do not read."""
    return logits.new_empty((1,)) if bias is None else bias.float().contiguous()


def scale_arguments(
    scale: Scale,  # a number, or (rows,)
    logits: Tensor,  # (rows, V) float32
) -> tuple[Tensor, int, float]:  # (rows,), has_scales, scale
    """Return the scale as the kernels take it; a number comes with a tensor that is not read."""
    if isinstance(scale, Tensor):
        return scale.contiguous(), 1, 1.0
    return logits.new_empty((1,)), 0, scale


@triton.jit
def load_scale(scales_ptr, has_scales, scale, row):
    """Return what multiplies a row's logits."""
    return tl.load(scales_ptr + row, mask=has_scales != 0, other=scale)


@triton.jit
def load_logits(
    logits_ptr,  # of the row
    bias_ptr,
    v,  # [BLOCK_V] columns
    V,
    has_bias,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    WHOLE: tl.constexpr,  # all of v is below V
):
    """Return one row's logits at columns v, e^z = 0 beyond V, and their cap's derivative."""
    z = load(logits_ptr, v, V, WHOLE) * scale
    if WHOLE:
        z += tl.load(bias_ptr + v, mask=has_bias != 0, other=0.0)
    else:
        z += tl.load(bias_ptr + v, mask=(v < V) & (has_bias != 0), other=0.0)
    derivative = 1.0
    if CAPPED:
        z, derivative = _cap(z, softcap)
    if not WHOLE:
        z = tl.where(v < V, z, LOWEST)
    return z, derivative


@triton.jit
def load_target(logits_ptr, bias_ptr, target, V, has_bias, scale, softcap, CAPPED: tl.constexpr):
    """Return the target's logit, NaN for one outside of V, and its cap's derivative."""
    ok = (target >= 0) & (target < V)
    z = tl.load(logits_ptr + target, mask=ok, other=float("nan")) * scale
    z += tl.load(bias_ptr + target, mask=ok & (has_bias != 0), other=0.0)
    derivative = 1.0
    if CAPPED:
        z, derivative = _cap(z, softcap)
    return z, derivative


@triton.jit
def largest_logit(
    logits_ptr, bias_ptr, V, has_bias, scale, softcap, CAPPED: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Return the largest logit of a row."""
    top = tl.full((BLOCK_V,), LOWEST, tl.float32)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z, _ = load_logits(logits_ptr, bias_ptr, v, V, has_bias, scale, softcap, CAPPED, False)
        top = tl.maximum(top, z)
    return tl.max(top, 0)


@triton.jit
def load(ptr, v, V, WHOLE: tl.constexpr):
    """Return columns v of a row in float32, zero beyond V."""
    if WHOLE:
        return tl.load(ptr + v).to(tl.float32)
    return tl.load(ptr + v, mask=v < V, other=0.0).to(tl.float32)


@triton.jit
def store(ptr, values, v, V, WHOLE: tl.constexpr):
    values = values.to(ptr.dtype.element_ty)
    if WHOLE:
        tl.store(ptr + v, values)
    else:
        tl.store(ptr + v, values, mask=v < V)


@triton.jit
def logp_dlogits(p, derivative, v, target, logp):
    """Return -dlogp/dz; the target has expm1(logp), because p - 1 rounds an exponential near 1."""
    return tl.where(v == target, expm1(logp), p) * derivative


@triton.jit
def _cap(z, softcap):
    """Return softcap * tanh(z / softcap) and its derivative, by e^(-2|y|): Triton has no tanh."""
    u = -2.0 * tl.abs(z / softcap)
    e = tl.exp(u)
    capped = softcap * (-expm1(u) / (1.0 + e))
    return tl.where(z < 0, -capped, capped), 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def expm1(x):
    """Return e^x - 1; for |x| < 1/2 by its series, whose first omitted term is 1e-8 of the sum."""
    series = 1.0
    for n in tl.static_range(8, 1, -1):
        series = 1.0 + x * series * (1.0 / n)
    return tl.where(tl.abs(x) < 0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """Return log(1 + x); for |x| < 1/2 by the series of 2 atanh(x / (2 + x)), to 1e-8 of it."""
    y = x / (2.0 + x)
    series = 1.0 / 15
    for n in tl.static_range(13, 0, -2):
        series = 1.0 / n + y * y * series
    return tl.where(tl.abs(x) < 0.5, 2.0 * y * series, tl.log(1.0 + x))
