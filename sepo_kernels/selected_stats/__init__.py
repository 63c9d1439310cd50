"""selected_stats: one definition (reference.py) and the implementations that must match it."""

from sepo_kernels.registry import always
from sepo_kernels.selected_stats import chunked, native, triton
from sepo_kernels.selected_stats.loops import implementation

# in priority order
IMPLS = (
    implementation("native", native.KERNELS, native.why_not),
    implementation("triton", triton.KERNELS, triton.why_not),
    implementation("chunked", chunked.KERNELS, always),
)
