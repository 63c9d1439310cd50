"""What the hardware wants, in one place. Imports torch only, so that `import sepo.ops` is cheap."""

import torch


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of every sum over D, V or M: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)
