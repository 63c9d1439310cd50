"""Which tensors a piece of code makes, inside the project's operators too."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sepo_kernels.selected_logprob import IMPLS

KERNELS = {
    "selected_logprob_fwd": {impl.name: impl.fwd for impl in IMPLS},
    "selected_logprob_bwd": {impl.name: impl.bwd for impl in IMPLS},
}


class Recorder(TorchDispatchMode):
    """Shapes and bytes of every tensor made, inside the operators too."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sepo":  # an opaque node: run its kernel under this mode
            with self:
                return KERNELS[func._schema.name.split("::")[1]][args[-1]](*args[:-1])
        out = func(*args, **(kwargs or {}))
        self.made += [
            (tuple(x.shape), x.nbytes) for x in tree_leaves(out) if isinstance(x, torch.Tensor)
        ]
        return out
