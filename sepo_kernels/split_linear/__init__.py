"""split_linear: one definition (reference.py) and the implementations that must match it."""

from sepo_kernels.registry import Impl, always
from sepo_kernels.split_linear import library, triton

# in priority order; it has no gradient. The library's products come first until a GPU has measured
# Triton's
IMPLS = (
    Impl("library", library.fwd, None, why_not=always),
    Impl("triton", triton.fwd, None, why_not=triton.why_not),
)
