"""split_linear on a GPU in one Triton kernel, which makes the activation's halves as it reads it."""

from torch import Tensor

from sepo_kernels import devices
from sepo_kernels.halves import kind_of


def why_not(x: Tensor, hi: Tensor) -> str | None:
    if kind_of(hi) != "bfloat16" and not devices.INTERPRET:
        return "the Triton kernel multiplies bfloat16 halves, got TF32's"
    return devices.why_not_triton(x)


def fwd(
    x: Tensor,  # (N, D) float32
    hi: Tensor,  # (V, D)
    lo: Tensor | None,  # (V, D); None: zero
    bias: Tensor | None,  # (V,) float32
) -> Tensor:  # (N, V) float32
    from sepo_kernels import triton_split

    (N, D), V = x.shape, hi.shape[0]
    y = x.new_empty((N, V))
    triton_split.launch(
        x, hi, hi if lo is None else lo, x if bias is None else bias.contiguous(), y,
        x.stride(0), hi.stride(0), N, V, D, int(bias is not None), THREE=lo is not None,
    )  # fmt: skip
    return y
