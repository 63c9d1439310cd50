"""What the hardware wants, in one place. Imports torch only, so that `import sepo.ops` is cheap."""

import importlib.util
import os

import torch

# read at import: Dynamo traces the readers, and cannot trace a look at the environment; Triton
# reads the same variable when a kernel is defined
TRITON = importlib.util.find_spec("triton") is not None
INTERPRET = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of every sum over D, V or M: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


# oneDNN's bfloat16 x bfloat16 -> float32 tiles; read at import, because Dynamo traces its readers
BFLOAT16_PRODUCTS = torch.backends.mkldnn.is_available() and (
    torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
)


def why_not_triton(x: torch.Tensor) -> str | None:
    """None if the Triton row kernels can run on `x`'s device in its dtype, else the reason."""
    if not TRITON:
        return "triton is not installed: pip install triton"
    if not (x.is_cuda or INTERPRET):
        return f"triton needs a GPU, or TRITON_INTERPRET=1 at import, got tensors on {x.device}"
    if accumulator(x.dtype) != torch.float32:
        return f"the Triton kernels compute in float32, got {x.dtype}"
    return None
