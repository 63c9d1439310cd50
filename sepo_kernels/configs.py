"""The Triton row kernels that exist, and their tile sizes: a table, not an autotuner at start-up.

Not yet measured on a GPU. The kernels are bound by memory: what a tile must do is keep about 32 KiB
of loads under way on each multiprocessor without spilling a register, which tests/triton_rows
reads back from the compiled code. A kernel that is not in the table cannot be launched, and
everything in it is compiled by that test.
"""

from typing import NamedTuple


class Config(NamedTuple):
    flags: tuple[str, ...]  # constexprs of the kernel, each False or True
    BLOCK_V: int  # columns of one tile, a power of two
    num_warps: int


CONFIGS = {
    # one program a row; wider, the capped kernel spills at the 64 registers that ptxas allows it
    "logprob_statistics": Config(("CAPPED",), BLOCK_V=2048, num_warps=8),
    # two rows at once
    "kl_statistics": Config(("CAPPED", "POLICY_FIRST"), BLOCK_V=1024, num_warps=8),
    # one program a tile
    "logprob_slope": Config(("CAPPED",), BLOCK_V=2048, num_warps=4),
    "kl_slopes": Config(("CAPPED", "POLICY_FIRST"), BLOCK_V=1024, num_warps=8),
    "kl_combine": Config((), BLOCK_V=1024, num_warps=4),
}
