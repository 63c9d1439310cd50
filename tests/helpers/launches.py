"""Triton's kernels, counted where they would be launched."""

from collections import Counter


def launch_nothing(monkeypatch) -> Counter:
    """Filled with the names of Triton's kernels, where they would be launched."""
    from triton.runtime.jit import JITFunction

    launched = Counter()
    launch = lambda kernel, *args, **options: launched.update([kernel.__name__])
    monkeypatch.setattr(JITFunction, "run", launch)
    return launched
