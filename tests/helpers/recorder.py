"""Which tensors a piece of code makes, inside the project's operators too, and their bytes."""

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sepo_kernels import selected_logprob, selected_logprob_kl, selected_stats, target_logits

KERNELS = {
    f"{op}_{direction}": {impl.name: getattr(impl, direction) for impl in module.IMPLS}
    for op, module in (
        ("selected_logprob", selected_logprob),
        ("selected_logprob_kl", selected_logprob_kl),
        ("selected_stats", selected_stats),
        ("target_logits", target_logits),
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
                return KERNELS[name][args[-1]](*args[:-1], **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.made += [
            (tuple(x.shape), x.nbytes) for x in tree_leaves(out) if isinstance(x, torch.Tensor)
        ]
        return out


def allocator_peak(fn) -> int:
    """Largest number of bytes alive above the start, as the allocator saw it.

    Of a library's product only the result counts: what oneDNN takes and returns within one (up to
    2 MB for AMX, small shapes too) is no buffer of the code that calls it.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        fn()
    events = prof.profiler.kineto_results.events()
    within = [
        (e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == "aten::mm"
    ]
    sizes: dict[int, int] = {}  # change of what is alive, by the time it counts from
    for event in events:
        if event.name() == "[memory]":
            time = event.start_ns()
            time = next((end for start, end in within if start <= time <= end), time)
            sizes[time] = sizes.get(time, 0) + event.nbytes()
    alive = peak = 0
    for time in sorted(sizes):
        alive += sizes[time]
        peak = max(peak, alive)
    return peak
