"""selected_stats: one definition (reference.py) and the implementations that must match it."""

from sepo_kernels.registry import always
from sepo_kernels.selected_stats import chunked
from sepo_kernels.selected_stats.loops import implementation

# in priority order
IMPLS = (implementation("chunked", chunked.KERNELS, always),)
