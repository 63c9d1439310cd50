"""selected_logprob_kl on a GPU: library matrix products, and Triton kernels over each pair of rows."""

from torch import Tensor

from sepo_kernels import platform, products
from sepo_kernels.selected_logprob_kl.loops import RowKernels
from sepo_kernels.selected_logprob_kl.schedule import POLICY_REF


def why_not(hidden: Tensor, *_) -> str | None:
    return platform.why_not_triton(hidden)


def forward(
    x: Tensor,  # (chunk, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    ref_x: Tensor,  # (chunk, D_ref)
    ref_weight: Tensor,  # (V, D_ref)
    ref_bias: Tensor | None,  # (V,)
    targets: Tensor,  # (chunk,)
    scale: float,
    softcap: float | None,
    direction: str,
    kept: tuple[Tensor, Tensor] | None,  # two (chunk, V), written
    logits: tuple[Tensor, Tensor],  # two (chunk, V) float32, scratch; may be the kept blocks
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # logp, ref_logp, kl (chunk,), state (chunk, 4)
    from sepo_kernels import triton_rows

    z, ref_z = logits
    products.logits(z, x, weight)
    products.logits(ref_z, ref_x, ref_weight)
    assert z.stride(1) == ref_z.stride(1) == 1
    (rows, V), targets = z.shape, targets.contiguous()
    logp = z.new_empty((rows,))
    ref_logp = z.new_empty((rows,))
    kl = z.new_empty((rows,))
    state = z.new_empty((rows, 4))
    triton_rows.launch(
        triton_rows.kl_statistics, rows, None,
        z, ref_z, triton_rows.bias_argument(bias, z), triton_rows.bias_argument(ref_bias, ref_z),
        targets, logp, ref_logp, kl, state, z.stride(0), ref_z.stride(0), V,
        int(bias is not None), int(ref_bias is not None), scale, softcap or 0.0,
        CAPPED=softcap is not None, POLICY_FIRST=_policy_first(direction),
    )  # fmt: skip
    if kept is not None:
        _write_slopes(
            kept, logits, bias, ref_bias, targets, scale, softcap, direction,
            logp, kl, state,
        )  # fmt: skip
    return logp, ref_logp, kl, state


def again(
    x: Tensor,  # (chunk, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    ref_x: Tensor,  # (chunk, D_ref)
    ref_weight: Tensor,  # (V, D_ref)
    ref_bias: Tensor | None,  # (V,)
    targets: Tensor,  # (chunk,)
    scale: float,
    softcap: float | None,
    direction: str,
    kept: tuple[Tensor, Tensor],  # two (chunk, V), written
    logits: tuple[Tensor, Tensor],  # two (chunk, V) float32, scratch; may be the kept blocks
    logp: Tensor,  # (chunk,)
    ref_logp: Tensor,  # (chunk,)
    kl: Tensor,  # (chunk,)
    state: Tensor,  # (chunk, 4)
) -> None:
    products.logits(logits[0], x, weight)
    products.logits(logits[1], ref_x, ref_weight)
    _write_slopes(
        kept, logits, bias, ref_bias, targets.contiguous(), scale, softcap,
        direction, logp, kl, state,
    )  # fmt: skip


def combine(
    first: Tensor,  # (M, columns) of -dlogp/dz
    second: Tensor,  # (M, columns) of dKL/dz
    targets: Tensor,  # (M,)
    start: int,  # the first of these columns
    logp: Tensor,  # (M,)
    kl: Tensor,  # (M,)
    state: Tensor,  # (M, 4)
    grad_logp: Tensor,  # (M,) float32
    grad_kl: Tensor,  # (M,) float32
    direction: str,
    out: Tensor,  # (M, columns), written: dZ
) -> None:
    from sepo_kernels import triton_rows

    assert first.stride(1) == second.stride(1) == out.stride(1) == 1
    rows, columns = out.shape
    triton_rows.launch(
        triton_rows.kl_combine, rows, columns,
        first, second, grad_logp.contiguous(), grad_kl.contiguous(), out,
        first.stride(0), second.stride(0), out.stride(0), columns,
    )  # fmt: skip


def _write_slopes(
    kept, logits, bias, ref_bias, targets, scale, softcap, direction,
    logp, kl, state,
) -> None:  # fmt: skip
    from sepo_kernels import triton_rows

    (first, second), (z, ref_z) = kept, logits
    assert first.stride(1) == second.stride(1) == z.stride(1) == ref_z.stride(1) == 1
    assert state.is_contiguous()
    rows, V = z.shape
    triton_rows.launch(
        triton_rows.kl_slopes, rows, V,
        z, ref_z, triton_rows.bias_argument(bias, z), triton_rows.bias_argument(ref_bias, ref_z),
        targets, logp, kl, state, first, second, z.stride(0), ref_z.stride(0), first.stride(0), second.stride(0), V,
        int(bias is not None), int(ref_bias is not None), scale, softcap or 0.0,
        CAPPED=softcap is not None, POLICY_FIRST=_policy_first(direction),
    )  # fmt: skip


def _policy_first(direction: str) -> bool:
    return direction == POLICY_REF


KERNELS = RowKernels(
    forward,
    again,
    combine,
    fused=lambda dtype: False,
    second_dtype=lambda dtype: dtype,
    num_state=4,
)
