"""The cost of a row of selected_stats whose entropy has a gradient: bytes of its buffers, and GEMMs.

Without that gradient a row costs what one of selected_logprob does. With it the forward saves the
logits in the accumulator's dtype: the logarithm of a probability in 16 bits would be off by all of
that rounding, which near a uniform row is more than the gradient.
"""

from typing import NamedTuple

import torch

from sepo_kernels.devices import accumulator, row_bytes
from sepo_kernels.schedules import NO_GRAD, SAVE, chunk_rows, saved_rows
from sepo_kernels.selected_logprob_kl.layout import MIN_COLUMNS, most_columns, saved_gradient

# of each row and group of columns, what a fused kernel keeps: the sums of e^z, z e^z, e^2z and z,
# and the largest z
FUSED_SUMS = 5


class EntropyLayout(NamedTuple):
    """Sizes of one row, as schedules.Layout."""

    V: int
    dtype: torch.dtype  # of the inputs, and of the logits' gradient
    fused: bool  # logits that are not saved stay in cache
    multiprocessors: int = 0  # of the GPU; 0: a CPU
    D: int = 1

    @property
    def heads(self) -> int:
        return 1

    @property
    def saved_bytes(self) -> int:
        """Return the bytes of one row that `save` saves: the logits."""
        return self._bytes(accumulator(self.dtype))

    @property
    def scratch_bytes(self) -> int:
        return 0  # the logits are written where they are saved

    @property
    def gradient_bytes(self) -> int:
        """Return the bytes of one row of the narrowest buffer for the gradient of saved logits."""
        return min(self.V, MIN_COLUMNS) * self.dtype.itemsize

    @property
    def widest_gradient_bytes(self) -> int:
        """Return the bytes of one row of the widest that a GPU makes use of."""
        return min(self.V, self.most_columns) * self.dtype.itemsize

    @property
    def most_columns(self) -> int:
        return most_columns(self.multiprocessors)

    @property
    def frozen_head_first(self) -> bool:
        return False

    @property
    def has_frozen_head(self) -> bool:
        return False  # two directions of dX are as many GEMMs as the logits once more and one

    def row_bytes(self, gradient: bool) -> int:
        """Return the bytes of buffers alive for each row of a chunk that is not saved.

        The gradient of recomputed logits takes their place where the dtype is the same.
        """
        wide = self._bytes(accumulator(self.dtype))
        narrow = self._bytes(self.dtype)
        if self.fused:
            return narrow if gradient else max(1, self.V * FUSED_SUMS // 64)
        return wide + (narrow if gradient and narrow != wide else 0)

    def saved_text(self, M: int) -> str:
        return f"logits (M, V) = ({M}, {self.V}) in {accumulator(self.dtype)} take"

    def peak_bytes(
        self,
        M: int,
        budget: int,  # bytes
        schedule: str,
    ) -> int:
        """Return the bytes of all buffers alive at once, the larger of both directions."""
        num_saved = saved_rows(M, self, budget, schedule)
        of_saved = saved_gradient(M, self, budget, schedule).num_bytes(self) if num_saved else 0
        if schedule == SAVE:
            return M * self.saved_bytes + of_saved
        fwd, bwd = (chunk_rows(M, self, budget, schedule, back) for back in (False, True))
        forward = fwd * self.row_bytes(gradient=False)
        if schedule == NO_GRAD:
            return forward
        most = max(of_saved, bwd * self.row_bytes(gradient=True), forward)
        return num_saved * self.saved_bytes + most

    @staticmethod
    def fwd_gemms(schedule: str) -> tuple[int]:
        """Return how many GEMMs of all M rows the forward takes."""
        return (1,)

    @staticmethod
    def bwd_rows(
        M: int,
        num_saved: int,  # rows that the forward saved
        schedule: str,
        need_hidden: bool,
        need_weight: bool,
    ) -> tuple[int]:
        """Return the rows that the backward multiplies with a (V, D), in all its GEMMs together."""
        if schedule == NO_GRAD:
            return (0,)
        return (M * (need_hidden + need_weight) + M - num_saved,)

    def _bytes(self, dtype: torch.dtype) -> int:
        return row_bytes(self.V, dtype, self.multiprocessors > 0)
