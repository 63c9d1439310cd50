"""target_logits: one definition (reference.py) and the implementations that must match it."""

from sepo_kernels.registry import always
from sepo_kernels.target_logits import chunked
from sepo_kernels.target_logits.loops import implementation

# in priority order; the names are selected_logprob's, so that one `impl` names both
IMPLS = (implementation("chunked", chunked.KERNELS, always, gathers=True),)
