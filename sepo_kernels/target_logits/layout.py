"""How many rows of the head target_logits gathers at once."""

from typing import NamedTuple

import torch

from sepo_kernels.devices import accumulator
from sepo_kernels.gemm import WIDE_TILE_BYTES
from sepo_kernels.schedules import DEFAULT_BUDGET, MEMORY_SHARE, even


class TargetLayout(NamedTuple):
    """Sizes of what is gathered for targets (M, K)."""

    M: int
    K: int
    D: int
    dtype: torch.dtype  # of the inputs
    gathers: bool  # False: a kernel reads the head where it lies
    memory: int = 0  # bytes of the GPU, all of them; 0: a CPU

    @property
    def entry_bytes(self) -> int:
        """Return the bytes of one gathered row: as it lies and, where that differs, widened."""
        acc = accumulator(self.dtype)
        return self.D * (acc.itemsize + (self.dtype.itemsize if self.dtype != acc else 0))

    @property
    def default_budget(self) -> int:
        """Return the bytes that all rows take, but at most a share of the GPU's memory."""
        if not self.memory:
            return DEFAULT_BUDGET
        wanted = self.M * self.K * self.entry_bytes if self.gathers else 0
        return max(self.entry_bytes, min(wanted, self.memory // MEMORY_SHARE))

    def block(self, budget: int) -> tuple[int, int]:
        """Return how many rows, and how many targets of each, are gathered at once."""
        # on a CPU no more than stay in cache: they are written, then read
        limit = budget if self.memory else min(budget, WIDE_TILE_BYTES)
        entries = max(1, limit // self.entry_bytes)
        if entries >= self.K:
            return even(self.M, entries // self.K), self.K
        return 1, even(self.K, entries)

    def peak_bytes(self, budget: int) -> int:
        """Return the bytes of all gathered rows alive at once."""
        rows, targets = self.block(budget)
        return rows * targets * self.entry_bytes if self.gathers else 0
