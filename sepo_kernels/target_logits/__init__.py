"""target_logits: one definition (reference.py) and the implementations that must match it."""

from sepo_kernels.registry import always
from sepo_kernels.target_logits import chunked, native, triton
from sepo_kernels.target_logits.loops import implementation

# in priority order; the names are selected_logprob's, so that one `impl` names both
IMPLS = (
    implementation("native", native.KERNELS, native.why_not, gathers=False),
    implementation("triton", triton.KERNELS, triton.why_not, gathers=False),
    implementation("chunked", chunked.KERNELS, always, gathers=True),
)
