"""segment_topk: one definition (reference.py) and the implementations that must match it."""

from sepo_kernels.registry import Impl, always
from sepo_kernels.segment_topk import sorting

# in priority order; selection has no gradient
IMPLS = (Impl("sorting", sorting.fwd, None, why_not=always),)
