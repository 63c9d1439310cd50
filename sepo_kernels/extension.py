"""The compiled half of the package, where it was built: its operators are torch.ops.sepo.native_*.

Implementations ask `why_not` and call the operators; nothing else knows that there is a library.
"""

import torch

try:
    from sepo_kernels import _C  # noqa: F401  registers the operators

    _MISSING = None
except ImportError as error:
    _MISSING = f"the native extension is not here ({error}); build it with: pip install -e ."


def why_not(operator: str, device: torch.device) -> str | None:
    """None if `torch.ops.sepo.<operator>` has a kernel for tensors on `device`, else the reason."""
    if _MISSING is not None:
        return _MISSING
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    known = key is not None and hasattr(torch.ops.sepo, operator)
    if not known or not torch._C._dispatch_has_kernel_for_dispatch_key(f"sepo::{operator}", key):
        return f"the native extension was built without a {device.type} kernel for {operator}"
    return None
