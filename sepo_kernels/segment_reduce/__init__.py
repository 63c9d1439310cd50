"""Sums over segments: one definition (reference.py) and the implementations that must match it."""

from sepo_kernels.registry import Impl, always
from sepo_kernels.segment_reduce import native, offsets

# in priority order
IMPLS = (
    Impl("native", native.fwd, native.bwd, why_not=native.why_not),
    Impl("offsets", offsets.fwd, offsets.bwd, why_not=always),
)
