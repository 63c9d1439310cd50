"""segment_topk: one definition (reference.py) and the implementations that must match it."""

from sepo_kernels.registry import Impl, always
from sepo_kernels.segment_topk import native, sorting

# in priority order; selection has no gradient
IMPLS = (
    Impl("native", native.fwd, None, why_not=native.why_not),
    Impl("sorting", sorting.fwd, None, why_not=always),
)
