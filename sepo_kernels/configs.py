"""The Triton row kernels that exist, and their tile sizes: a table, not an autotuner at start-up.

Not yet measured on a GPU. The kernels are bound by memory: what a tile must do is keep about 32 KiB
of loads under way on each multiprocessor, 16 bytes to a load, without spilling a register, which
tests/triton_rows reads back from the compiled code. A kernel that is not in the table cannot be
launched, and everything in it is compiled by that test.
"""

from typing import NamedTuple

import torch


class Config(NamedTuple):
    flags: tuple[str, ...]  # constexprs of the kernel, each False or True
    BLOCK_V: int  # columns of one tile, a power of two
    num_warps: int
    # a thread's at most on NVIDIA's, without a cap and with: tests/triton_rows holds the code to it
    registers: int
    registers_capped: int | None = None

    @property
    def resident(self) -> int:
        """Programs without a cap that one multiprocessor of 65 536 registers and 64 warps holds."""
        return min(64, (1 << 16) // (32 * self.registers)) // self.num_warps


CONFIGS = {
    # one program a row
    "logprob_row": Config(
        ("CAPPED", "SLOPE"), 1024, num_warps=8, registers=32, registers_capped=40
    ),
    # two rows at once; with 8 warps the capped kernel spills at the 64 registers that ptxas allows
    "kl_row": Config(
        ("CAPPED", "POLICY_FIRST", "KEPT"), 512, num_warps=4, registers=64, registers_capped=72
    ),
    # one program a tile
    "logprob_slope": Config(("CAPPED",), 2048, num_warps=8, registers=40, registers_capped=48),
    "kl_ratios": Config(("CAPPED",), 1024, num_warps=8, registers=40, registers_capped=48),
    "kl_slopes": Config(
        ("CAPPED", "POLICY_FIRST"), 1024, num_warps=8, registers=40, registers_capped=48
    ),
    # 8 columns to a thread, of 16 bits each
    "kl_combine": Config((), 1024, num_warps=4, registers=40),
    "kl_combine_ratios": Config(("POLICY_FIRST",), 1024, num_warps=4, registers=72),
}
# rows under way on one multiprocessor where one head walks a row, and where two walk a pair of them
RESIDENT_ROWS = {1: CONFIGS["logprob_row"].resident, 2: CONFIGS["kl_row"].resident}


def one_pass(dtype: torch.dtype) -> bool:  # of the inputs
    """Whether what is kept of a row is written while the row is read for the first time.

    It is e^(z - z_target), which reaches 2^60: float16 ends before; float32 blocks take the logits'
    place, and a row whose target is hopeless could not be done again.
    """
    return dtype == torch.bfloat16


def bytes_moved(
    step: str,  # forward: nothing kept of the row; slope: forward that keeps; again; combine
    heads: int,  # 1 or 2; combine is of two
    V: int,  # of combine the columns
    dtype: torch.dtype,  # of the inputs
) -> int:
    """Bytes of memory that the row kernels read and write of one row's (1, V) buffers."""
    wide, kept = 4 * heads * V, dtype.itemsize * heads * V  # logits; what is kept
    if step == "forward":
        return wide
    if step == "slope":
        return wide + kept if one_pass(dtype) else 2 * wide + kept
    if step == "again":
        return wide + kept
    assert step == "combine" and heads == 2, (step, heads)
    return kept + dtype.itemsize * V
