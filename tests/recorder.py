"""Which tensors a piece of code makes, inside the project's operators too, and their bytes."""

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sepo_kernels import selected_logprob, selected_logprob_kl

KERNELS = {
    f"{op}_{direction}": {impl.name: getattr(impl, direction) for impl in module.IMPLS}
    for op, module in (
        ("selected_logprob", selected_logprob),
        ("selected_logprob_kl", selected_logprob_kl),
    )
    for direction in ("fwd", "bwd")
}


class Recorder(TorchDispatchMode):
    """Shapes and bytes of every tensor made, inside the operators too."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("sepo::")
        if name in KERNELS:  # an opaque node: run its kernel under this mode
            with self:
                return KERNELS[name][args[-1]](*args[:-1])
        out = func(*args, **(kwargs or {}))
        self.made += [
            (tuple(x.shape), x.nbytes) for x in tree_leaves(out) if isinstance(x, torch.Tensor)
        ]
        return out


def allocator_peak(fn) -> int:
    """Largest number of bytes alive above the start, as the allocator saw it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        fn()
    events = prof.profiler.kineto_results.events()
    sizes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    alive = peak = 0
    for _, size in sorted(sizes, key=lambda pair: pair[0]):
        alive += size
        peak = max(peak, alive)
    return peak
