"""split_linear on a CPU that multiplies bfloat16 tiles: one pass, with its sums in cache."""

import torch
from torch import Tensor

from sepo_kernels import extension
from sepo_kernels.halves import kind_of

# evaluated once, at import: Dynamo traces why_not
_MISSING = extension.why_not("native_split_linear", torch.device("cpu"))


def why_not(x: Tensor, hi: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"expected tensors on a CPU, got {x.device}"
    if kind_of(hi) != "bfloat16":
        return "the native kernel multiplies bfloat16 halves, got TF32's"
    if _MISSING is None and not extension.BFLOAT16_TILES:
        return "no bfloat16 tiles with float32 sums here"
    return _MISSING


def fwd(
    x: Tensor,  # (N, D) float32
    hi: Tensor,  # (V, D)
    lo: Tensor | None,  # (V, D); None: zero
    bias: Tensor | None,  # (V,) float32
) -> Tensor:  # (N, V) float32
    return torch.ops.sepo.native_split_linear(x, hi, lo, bias)
