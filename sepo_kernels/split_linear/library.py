"""split_linear by the library's products: on a GPU of bfloat16 halves, each with a float32 sum.

A CPU has no such product. There bfloat16 halves are held in float32, and multiplied exactly.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sepo_kernels import gemm
from sepo_kernels.halves import halves, kind_of


def fwd(
    x: Tensor,  # (N, D) float32
    hi: Tensor,  # (V, D)
    lo: Tensor | None,  # (V, D); None: zero
    bias: Tensor | None,  # (V,) float32
) -> Tensor:  # (N, V) float32
    x_hi, x_lo = halves(x, kind_of(hi))
    held = lambda half: half if half.is_cuda else half.float()
    with short_products(hi):
        y = gemm.gemm(held(x_hi), held(hi).T)
        gemm.add_gemm(y, held(x_lo), held(hi).T)
        if lo is not None:
            gemm.add_gemm(y, held(x_hi), held(lo).T)
    return y if bias is None else y.add_(bias)


@contextmanager
def short_products(hi: Tensor) -> Iterator[None]:
    """Let torch multiply float32 numbers in the short ones that they are, where a device can.

    TF32 on a GPU; bfloat16 on a CPU that has its instructions. The operands are exact in them, so
    only the speed changes.
    """
    # torch puts an object in place of the module, which its types don't know
    cpu = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    settings = {
        ("cuda", "tf32"): (torch.backends.cuda.matmul, "tf32"),
        ("cpu", "bfloat16"): (cpu, "bf16"),
    }
    setting, short = settings.get((hi.device.type, kind_of(hi)), (cpu, cpu.fp32_precision))
    before = setting.fp32_precision
    try:
        setting.fp32_precision = short
        yield
    finally:
        setting.fp32_precision = before
