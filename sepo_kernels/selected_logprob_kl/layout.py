"""The cost of a row of selected_logprob_kl: bytes of its (rows, V) buffers, and GEMMs.

The budget also bounds the (rows, columns) buffer for the gradient of the logits.
"""

from typing import NamedTuple, Protocol

import torch

from sepo_kernels import waves
from sepo_kernels.devices import accumulator, row_bytes
from sepo_kernels.schedules import FROZEN_HEAD, NO_GRAD, SAVE, Layout, chunk_rows, even, saved_rows

# the reference's weight beta in the mixture m = (1 - beta) p + beta q says which divergence: at its
# ends KL(q || p) and KL(p || q), between them beta KL(q || m) + (1 - beta) KL(p || m)
REF_POLICY, POLICY_REF = 0.0, 1.0
DIRECTIONS = {"ref||policy": REF_POLICY, "policy||ref": POLICY_REF}
JSD = "jsd"  # in ("jsd", beta)
# the gradient of the logits is computed and multiplied this many columns at a time: with fewer,
# each GEMM reads all of X again for little work; with many more, the buffer leaves the cache. On a
# GPU a tile of the vocabulary for each multiprocessor: dW is then in whole waves, for any D
MIN_COLUMNS, MAX_COLUMNS = 4096, 16384


def is_jsd(beta: float) -> bool:
    return REF_POLICY < beta < POLICY_REF


class ColumnLayout(Layout, Protocol):
    """Describe a row of an operation whose backward makes the logits' gradient by columns."""

    @property
    def most_columns(self) -> int: ...  # that are worth a wider buffer


class TwoHeadLayout(NamedTuple):
    """Sizes of one row, as schedules.Layout."""

    V: int
    dtype: torch.dtype  # of the inputs, of the first block and of the logits' gradient
    second: torch.dtype  # of the second block
    fused: bool  # both heads' logits stay in cache
    multiprocessors: int = 0  # of the GPU; 0: a CPU
    D: int = 1  # of the policy

    @property
    def heads(self) -> int:
        return 2

    @property
    def saved_bytes(self) -> int:
        """Return the bytes of one row that `save` saves: both blocks."""
        return self._bytes(self.dtype) + self._bytes(self.second)

    @property
    def scratch_bytes(self) -> int:
        """Return the bytes of one row of logits that no block has room for."""
        acc = accumulator(self.dtype)
        wide = (self.dtype != acc) + (self.second != acc)
        return 0 if self.fused else wide * self._bytes(acc)

    @property
    def gradient_bytes(self) -> int:
        """Return the bytes of one row of the narrowest buffer for the gradient of the logits."""
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
        return False  # 4 GEMMs, where `save` takes 3

    @property
    def has_frozen_head(self) -> bool:
        return True

    def row_bytes(self, gradient: bool) -> int:
        """Return the bytes of blocks alive for each row of a chunk, in a schedule but `save`."""
        if gradient:
            return self.saved_bytes + self.scratch_bytes + self.gradient_bytes
        if self.fused:  # its sums of column groups take far less than 16 bits an entry
            return self.V // 4
        return 2 * self._bytes(accumulator(self.dtype))

    def saved_text(self, M: int) -> str:
        return f"two (M, V) = ({M}, {self.V}) blocks take"

    def peak_bytes(
        self,
        M: int,
        budget: int,  # bytes
        schedule: str,
    ) -> int:
        """Return the bytes of all buffers alive at once, the larger of both directions."""
        fwd = min(M, chunk_rows(M, self, budget, schedule, backward=False))
        forward = fwd * self.row_bytes(gradient=False)
        if schedule == NO_GRAD:
            return forward
        num_saved = saved_rows(M, self, budget, schedule)
        of_saved = saved_gradient(M, self, budget, schedule).num_bytes(self) if num_saved else 0
        if schedule == SAVE:
            return M * self.saved_bytes + max(fwd * self.scratch_bytes, of_saved)
        chunk = chunk_gradient(M, self, budget, schedule)
        of_chunk = chunk.rows * (self.saved_bytes + self.scratch_bytes) + chunk.num_bytes(self)
        if schedule == FROZEN_HEAD:
            return of_chunk
        return num_saved * self.saved_bytes + max(of_saved, of_chunk, forward)

    @staticmethod
    def fwd_gemms(schedule: str) -> tuple[int, int]:
        """Return the forward's GEMMs of all M rows, with the policy's weight and the reference's."""
        return (3 if schedule == FROZEN_HEAD else 1), 1

    @staticmethod
    def bwd_rows(
        M: int,
        num_saved: int,  # rows that the forward saved
        schedule: str,
        need_hidden: bool,
        need_weight: bool,
    ) -> tuple[int, int]:
        """Return the rows that the backward multiplies with each head's weight."""
        if schedule in (FROZEN_HEAD, NO_GRAD):
            return 0, 0
        recomputed = M - num_saved
        return M * (need_hidden + need_weight) + recomputed, recomputed

    def _bytes(self, dtype: torch.dtype) -> int:
        return row_bytes(self.V, dtype, self.multiprocessors > 0)


def most_columns(multiprocessors: int) -> int:
    """Return the columns that are worth a buffer: on a GPU whole waves of its multiprocessors."""
    if multiprocessors == 0:
        return MAX_COLUMNS
    wave = multiprocessors * waves.TILE_ROWS
    return -(-MIN_COLUMNS // wave) * wave


class Gradient(NamedTuple):
    """The buffer for the logits' gradient, of which one is alive at a time."""

    rows: int  # of a chunk
    columns: int

    def num_bytes(self, layout: ColumnLayout) -> int:
        return self.rows * self.columns * layout.dtype.itemsize


def saved_gradient(M: int, layout: ColumnLayout, budget: int, schedule: str) -> Gradient:
    """Return the buffer of the rows whose blocks are saved."""
    rows = saved_rows(M, layout, budget, schedule)
    return Gradient(rows, chunk_columns(rows, layout, budget - rows * layout.saved_bytes))


def chunk_gradient(M: int, layout: TwoHeadLayout, budget: int, schedule: str) -> Gradient:
    """Return the buffer of a chunk of rows whose blocks are computed when they are used."""
    num_saved = saved_rows(M, layout, budget, schedule)
    rows = chunk_rows(M, layout, budget, schedule, backward=schedule != FROZEN_HEAD)
    rows = min(M - num_saved, rows)
    blocks = rows * (layout.saved_bytes + layout.scratch_bytes)
    return Gradient(
        rows, chunk_columns(rows, layout, budget - num_saved * layout.saved_bytes - blocks)
    )


def chunk_columns(
    rows: int,  # of the chunk
    layout: ColumnLayout,
    room: int,  # bytes that the budget leaves beside blocks and logits
) -> int:
    """Return the columns of the buffer for the logits' gradient."""
    most = layout.most_columns
    limit = room // max(1, rows) // layout.dtype.itemsize
    limit = min(max(limit, MIN_COLUMNS), most) // 64 * 64
    if layout.multiprocessors and limit == most:
        return min(layout.V, most)
    return min(layout.V, -(-even(layout.V, limit) // 64) * 64)
