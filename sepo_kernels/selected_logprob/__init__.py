"""selected_logprob: one definition (reference.py) and the implementations that must match it."""

from sepo_kernels.registry import Impl, always
from sepo_kernels.selected_logprob import chunked

# in priority order
IMPLS = (Impl("chunked", chunked.fwd, chunked.bwd, why_not=always),)
