"""split_linear: one definition (reference.py) and the implementations that must match it."""

from sepo_kernels.registry import Impl, always
from sepo_kernels.split_linear import library, native, triton

# in priority order; it has no gradient. On a GPU the library's products come first until one has
# measured Triton's
IMPLS = (
    Impl("native", native.fwd, None, why_not=native.why_not),
    Impl("library", library.fwd, None, why_not=always),
    Impl("triton", triton.fwd, None, why_not=triton.why_not),
)
