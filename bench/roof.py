"""The roof over a case: a matrix product and a copy, timed in the same rounds as the case itself."""

import statistics

import torch

from bench import measure
from bench.dtypes import quick

SIDE = {"cpu": 2048, "cuda": 8192}  # of the product's square matrices
SIZE = {"cpu": 2**27, "cuda": 2**30}  # bytes that the copy reads, and as many that it writes


class Roof:
    """What this machine reaches in these minutes, whatever its data sheet says."""

    def __init__(self, device: str, dtype: torch.dtype):
        dtype = quick(dtype, device)  # what can be reached is what is fastest
        side, generator = SIDE[device], torch.Generator(device).manual_seed(0)
        # drawn: a GPU multiplies zeros faster, and tells of a roof that nothing can reach
        draw = lambda: torch.randn(side, side, generator=generator, device=device).to(dtype)
        self.dtype, self.side = dtype, side
        a, b, c = draw(), draw(), draw()
        source = torch.ones(SIZE[device], dtype=torch.uint8, device=device)
        target = source.clone()
        calls = {"gemm": lambda: torch.mm(a, b, out=c), "copy": lambda: target.copy_(source)}
        for call in calls.values():
            call()
        self._turns = measure.Turns(calls, device)
        self._bytes = 2 * SIZE[device]

    def turn(self) -> None:
        self._turns.turn()

    @property
    def flop_rate(self) -> float:  # FLOP a second
        return 2 * self.side**3 / statistics.median(self._turns.seconds["gemm"])

    @property
    def byte_rate(self) -> float:  # bytes a second, read and written ones
        return self._bytes / statistics.median(self._turns.seconds["copy"])

    @property
    def rates(self) -> dict[str, float]:  # for the rows in a file
        return {"roof_flop_rate": self.flop_rate, "roof_byte_rate": self.byte_rate}

    def share(self, flop: float, size: float, seconds: float) -> float:
        """Of the roof: 1 if nothing but the work itself took time, at these rates."""
        return max(flop / self.flop_rate, size / self.byte_rate) / seconds

    def __str__(self) -> str:
        return (
            f"roof: {_short(self.flop_rate)}FLOP/s in a {str(self.dtype).partition('.')[2]} product "
            f"of {self.side}³, {_short(self.byte_rate)}B/s in a copy"
        )


def _short(rate: float) -> str:
    return f"{rate / 1e12:.1f} T" if rate >= 1e12 else f"{rate / 1e9:.1f} G"
