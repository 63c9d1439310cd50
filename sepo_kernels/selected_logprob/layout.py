"""The cost of a row of selected_logprob: bytes of its (rows, V) buffers, and GEMMs."""

from typing import NamedTuple

import torch

from sepo_kernels.devices import accumulator, row_bytes
from sepo_kernels.schedules import FROZEN_HEAD, NO_GRAD, SAVE, chunk_rows, saved_rows


class HeadLayout(NamedTuple):
    """Sizes of one row, as schedules.Layout."""

    V: int
    dtype: torch.dtype  # of the inputs, and of dlogits
    capped: bool
    fused: bool  # the logits stay in cache: no buffer in the accumulator's dtype
    multiprocessors: int = 0  # of the GPU; 0: a CPU
    D: int = 1
    fused_sums: int = 1  # float32 sums of each row and group of columns, of a fused kernel

    @property
    def heads(self) -> int:
        return 1

    @property
    def saved_bytes(self) -> int:
        """Return the bytes of one row that `save` saves: dlogits."""
        return self._bytes(self.dtype)

    @property
    def scratch_bytes(self) -> int:
        """Return `row_bytes` of `save` but for dlogits: 0 for a float32 head without cap."""
        return self.row_bytes(gradient=True) - self.saved_bytes

    @property
    def gradient_bytes(self) -> int:
        return 0  # dlogits are the operand of both GEMMs

    @property
    def widest_gradient_bytes(self) -> int:
        return 0

    @property
    def frozen_head_first(self) -> bool:
        return True  # 2 GEMMs, as `save`, and no (M, V) block

    @property
    def has_frozen_head(self) -> bool:
        return True

    def row_bytes(self, gradient: bool) -> int:
        """Return the bytes of (1, V) buffers alive for each row of a chunk.

        One accumulator buffer goes from logits to probabilities in place. A gradient adds a copy
        in the input's dtype, where that differs, for the GEMM; a soft cap adds its derivative.
        """
        if self.fused:  # a float32 sum is kept for each group of 512 columns and, padded, row
            return self.saved_bytes if gradient else max(1, self.V * self.fused_sums // 64)
        acc = accumulator(self.dtype)
        wide = self._bytes(acc)
        if not gradient:
            return wide
        return wide + (self.saved_bytes if self.dtype != acc else 0) + (wide if self.capped else 0)

    def saved_text(self, M: int) -> str:
        return f"(M, V) = ({M}, {self.V}) in {self.dtype} takes"

    def peak_bytes(
        self,
        M: int,
        budget: int,  # bytes
        schedule: str,
    ) -> int:
        """Return the bytes of all (rows, V) buffers at once, the larger of both directions."""
        fwd, bwd = (chunk_rows(M, self, budget, schedule, back) for back in (False, True))
        if schedule == SAVE:
            return M * self.saved_bytes + min(fwd, M) * self.scratch_bytes
        if schedule in (FROZEN_HEAD, NO_GRAD):
            return fwd * self.row_bytes(gradient=schedule == FROZEN_HEAD)
        num_saved = saved_rows(M, self, budget, schedule)
        scratch = self.scratch_bytes if num_saved else 0
        forward = fwd * max(self.row_bytes(gradient=False), scratch)
        return num_saved * self.saved_bytes + max(bwd * self.row_bytes(gradient=True), forward)

    @staticmethod
    def fwd_gemms(schedule: str) -> tuple[int]:
        """Return how many GEMMs of all M rows the forward takes."""
        return (2 if schedule == FROZEN_HEAD else 1,)

    @staticmethod
    def bwd_rows(
        M: int,
        num_saved: int,  # rows that the forward saved
        schedule: str,
        need_hidden: bool,
        need_weight: bool,
    ) -> tuple[int]:
        """Return the rows that the backward multiplies with a (V, D), in all its GEMMs together."""
        if schedule in (FROZEN_HEAD, NO_GRAD):
            return (0,)
        return (M * (need_hidden + need_weight) + M - num_saved,)

    def _bytes(self, dtype: torch.dtype) -> int:
        return row_bytes(self.V, dtype, self.multiprocessors > 0)
