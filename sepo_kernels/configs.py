"""The Triton row kernels that exist, and their tile sizes: a table, not an autotuner at start-up.

Not yet measured on a GPU. The kernels are bound by memory: a tile must keep about 32 KiB of loads
under way on each multiprocessor, 16 bytes to a load, without spilling a register. tests/triton_rows
reads the registers back from the compiled code. A kernel that is not in the table cannot be
launched, and everything in the table is compiled by that test.
"""

from typing import NamedTuple

import torch


class Config(NamedTuple):
    flags: tuple[str, ...]  # constexprs of the kernel, each False or True
    BLOCK_V: int  # columns of one tile, a power of two
    num_warps: int
    # at most a thread's on NVIDIA GPUs, without a cap and with one: tests/triton_rows checks it
    registers: int
    registers_capped: int | None = None

    @property
    def resident(self) -> int:
        """Return the uncapped programs that fit in a multiprocessor: 65 536 registers, 64 warps."""
        return min(64, (1 << 16) // (32 * self.registers)) // self.num_warps


CONFIGS = {
    # one program a row
    "logprob_row": Config(
        ("CAPPED", "WRITE_DLOGITS"), 1024, num_warps=8, registers=32, registers_capped=40
    ),
    # two rows at once; with 8 warps the capped kernel spills at the 64 registers that ptxas allows
    "kl_row": Config(
        ("CAPPED", "POLICY_FIRST", "WRITE_BLOCKS"),
        512,
        num_warps=4,
        registers=64,
        registers_capped=72,
    ),
    # as kl_row: with 8 warps the capped kernel has a number on the stack on sm_90
    "stats_row": Config(
        ("CAPPED", "WRITE_DLOGITS"), 512, num_warps=4, registers=58, registers_capped=64
    ),
    "entropy_row": Config(("CAPPED",), 1024, num_warps=8, registers=40, registers_capped=48),
    "jsd_row": Config(("CAPPED",), 512, num_warps=4, registers=64, registers_capped=72),
    # one program a tile
    "logprob_dlogits": Config(("CAPPED",), 2048, num_warps=8, registers=40, registers_capped=48),
    "entropy_dlogits": Config(("CAPPED",), 1024, num_warps=8, registers=40, registers_capped=48),
    "kl_ratios": Config(("CAPPED",), 1024, num_warps=8, registers=40, registers_capped=48),
    "kl_dlogits": Config(
        ("CAPPED", "POLICY_FIRST"), 1024, num_warps=8, registers=40, registers_capped=48
    ),
    "jsd_dlogits": Config(("CAPPED",), 1024, num_warps=8, registers=40, registers_capped=48),
    # 8 columns to a thread, of 16 bits each
    "kl_combine": Config((), 1024, num_warps=4, registers=40),
    "kl_combine_ratios": Config(("POLICY_FIRST",), 1024, num_warps=4, registers=72),
    "jsd_combine_ratios": Config((), 1024, num_warps=4, registers=72),
    # of K targets a row: columns are of D, and the last two hold several rows
    "target_dots": Config((), 1024, num_warps=4, registers=40),
    "target_sums": Config((), 256, num_warps=4, registers=48),
    "target_add": Config((), 256, num_warps=4, registers=68),
}
# rows under way on one multiprocessor, by the number of heads
RESIDENT_ROWS = {1: CONFIGS["logprob_row"].resident, 2: CONFIGS["kl_row"].resident}


def one_pass(dtype: torch.dtype) -> bool:  # of the inputs
    """Return whether a row's dlogits or blocks are written while it is read for the first time.

    They hold e^(z - z_target), which reaches 2^60, more than float16 can; and float32 blocks
    overwrite the logits, so that a row whose target is hopeless could not be redone.
    """
    return dtype == torch.bfloat16


def bytes_moved(
    step: str,  # "forward" alone, "dlogits": a forward that writes them, "recompute", "combine"
    heads: int,  # 1 or 2; combine is of two
    V: int,  # of "combine": the columns
    dtype: torch.dtype,  # of the inputs
) -> int:
    """Return the bytes that the row kernels read and write of one row's (1, V) buffers."""
    logits, blocks = 4 * heads * V, dtype.itemsize * heads * V
    if step == "forward":
        return logits
    if step == "dlogits":
        return logits + blocks if one_pass(dtype) else 2 * logits + blocks
    if step == "recompute":
        return logits + blocks
    assert step == "combine" and heads == 2, (step, heads)
    return blocks + dtype.itemsize * V
