"""How long the demo will take on this machine, from the work of its stages and a quick measurement."""

import time
from collections.abc import Mapping
from typing import NamedTuple

import torch

from sepo_kernels.devices import bfloat16_speed, fast_dtype


class Work(NamedTuple):
    """For one of something: products, which are counted, and what no count tells, measured."""

    float32: float = 0.0  # TFLOP in float32
    fast: float = 0.0  # TFLOP in the dtype that the machine multiplies fastest
    other: float = 0.0  # seconds on two cores: optimiser, norms, attention, casts, reading


# a pair has 90 tokens, prompt once, and 80 rows of the head; `other` is what two runs on two cores
# took beyond the products, one with AMX and one with AVX2 alone
STAGES = {
    "model": {"run": Work(other=15)},
    "reference": {"all pairs": Work(float32=0.024, other=0.035)},
    "oracle": {"oracle pairs": Work(fast=0.071, other=0.25)},
    "score": {"all pairs": Work(float32=0.024, other=0.035)},
    "sepo": {"pairs": Work(fast=0.058, other=0.12)},
    "sepo_rand": {"pairs": Work(fast=0.058, other=0.12)},
    "evaluate": {
        "samples": Work(fast=0.033, other=0.06),  # of each of three policies
        "openings": Work(float32=0.052, other=0.04),  # the divergence of two
        "held-out pairs": Work(float32=0.009, fast=0.044, other=0.03),  # the accuracy of two
    },
}


def estimate(
    counts: Mapping[str, int],  # of all that STAGES are for
) -> str:
    """One line: minutes, why so many here, and seconds of every stage."""
    cores, fast = torch.get_num_threads(), fast_dtype("cpu")
    rate = {dtype: tflops(dtype) for dtype in {torch.float32, fast}}
    seconds = {
        stage: sum(
            counts[what]
            * (work.float32 / rate[torch.float32] + work.fast / rate[fast] + work.other * 2 / cores)
            for what, work in parts.items()
        )
        for stage, parts in STAGES.items()
    }
    speed = bfloat16_speed("cpu") if fast == torch.float32 else rate[fast] / rate[torch.float32]
    stages = ", ".join(f"{stage} {value:.0f}" for stage, value in seconds.items())
    several = lambda n, what: f"{n} {what}" + "s" * (n != 1)
    return (
        f"about {several(max(1, round(sum(seconds.values()) / 60)), 'minute')} on this machine "
        f"({several(cores, 'core')}, {rate[torch.float32]:.2f} TFLOP/s in float32, bfloat16 at {speed:.2g} times that); "
        f"stages, seconds: {stages}"
    )


def tflops(dtype: torch.dtype) -> float:
    """TFLOP a second of a product such as the demo's are."""
    a, b = torch.ones(1024, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
    best = float("inf")  # the first one compiles its kernel; neighbours only ever slow one down
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * a.numel() * b.shape[1] / best / 1e12
