"""Checking the values of segment offsets, where that costs no wait: on the CPU."""

from torch import Tensor


def check_values(
    name: str,
    offsets: Tensor,  # (S + 1,)
    total: int,
) -> None:
    """Raise ValueError unless offsets on the CPU rise from 0 to `total`; elsewhere do nothing.

    On a GPU the check would wait; what made the offsets has checked them.
    """
    if offsets.device.type != "cpu":
        return
    first, last = int(offsets[0]), int(offsets[-1])
    if (first, last) != (0, total):
        raise ValueError(f"expected {name} from 0 to {total}, got from {first} to {last}")
    falls = (offsets.diff() < 0).nonzero()
    if len(falls):
        s = int(falls[0])
        before, after = offsets[s : s + 2].tolist()
        raise ValueError(f"expected {name} that never falls, got {before}, {after} at {s}")
