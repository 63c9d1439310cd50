"""Kernels for selective preference optimisation: functions on tensors, no autograd, no I/O.

Dimension letters, used in every shape comment of the project:

    P  pairs in a micro-batch            S  segments, S = 2 P (2p = chosen, 2p + 1 = rejected)
    N  rows of the packed buffer         M  selected tokens (all segments together)
    D  model width                       V  vocabulary
    T  tokens of one response            K  selected positions of one response, or targets of a row
"""

import sys

from sepo_kernels import devices

# its name until 0.1, a file that hid the standard library's from whoever stood in this folder
platform = sys.modules["sepo_kernels.platform"] = devices
