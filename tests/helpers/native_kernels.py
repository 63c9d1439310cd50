"""Whether this installation has the native kernels: `SEPO_EXT=none` and no compiler leave them out.

A test that can't do without them is marked `native`: conftest.py skips it with this one reason.
Where they should be, the import warns, and a warning is an error here.
"""

import torch

from sepo_kernels import extension

LACKING = extension.why_not("native_segment_sum", torch.device("cpu"))  # None: they are here
