"""Seconds that a GPU takes: the larger of FLOP over its rate and bytes over its bandwidth.

Kernel by kernel, one after the other, and nothing is moved between GPUs while they compute: the
order in which plain PyTorch does it. What no number here stands for is not in it: Python's own
time, waiting for the slowest rank, the data loader, checkpoints, evaluation.
"""

import re
from dataclasses import dataclass

import torch

from sepo.cost.work import NEEDED, PARTS, Work
from sepo.errors import InputError

# what a good kernel reaches; assumed, and printed wherever hours are
UTILISATION = 0.6  # of the products' rate
BANDWIDTH_SHARE = 0.8
HOST_LINK = 25e9  # bytes a second, one direction of PCIe 4.0 with 16 lanes; assumed
HOST_MEMORY = 200e9  # bytes a second, assumed


@dataclass(frozen=True)
class GPU:
    """Rates of the vendor's data sheet."""

    name: str
    flop: float  # dense bfloat16 products, a second
    float32: float  # the same in float32, TF32 off
    bandwidth: float  # bytes a second
    link: float  # bytes a second to another GPU, one direction
    memory: float  # bytes


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("B200", 2250e12, 80e12, 8.0e12, 900e9, 180e9),
        GPU("H200", 989e12, 67e12, 4.8e12, 450e9, 141e9),
        GPU("H100", 989e12, 67e12, 3.35e12, 450e9, 80e9),
        GPU("A100", 312e12, 19.5e12, 2.0e12, 300e9, 80e9),
        GPU("A100-PCIe", 312e12, 19.5e12, 1.9e12, 32e9, 80e9),  # without a bridge
        GPU("L40S", 362e12, 91.6e12, 864e9, 32e9, 48e9),
    )
}


def find(name: str) -> GPU:
    """By the name of the table. Raises InputError."""
    if name not in GPUS:
        raise InputError(f"gpu: expected {' | '.join(GPUS)}, got {name}")
    return GPUS[name]


def of_device(device_name: str) -> GPU | None:
    """By what the driver calls it; None for one that is not in the table."""
    if re.search(r"\bA100.*PCIe?\b", device_name, re.IGNORECASE):
        return GPUS["A100-PCIe"]
    return next((gpu for name, gpu in GPUS.items() if re.search(rf"\b{name}\b", device_name)), None)


def here() -> GPU | None:
    """This machine's; None for none, and for one that is not in the table."""
    return of_device(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


@dataclass(frozen=True)
class Arithmetic:
    """In what numbers a pass computes, and how it makes a product of them."""

    name: str
    float32: bool = False  # numbers twice as long
    halves: int = 0  # 16-bit products that make up one of float32 numbers; 0: none do

    def rate(self, gpu: GPU, kernel: str) -> float:
        """FLOP a second that the data sheet allows, of what the model needs."""
        if self.halves and kernel in PRODUCTS:
            return gpu.flop / self.halves
        return gpu.float32 if self.float32 else gpu.flop

    def moved(self, kernel: str) -> tuple[float, float]:
        """Bytes while it computes and before, over those of 16-bit numbers.

        Halves are made in a pass of their own, which reads 4 bytes and writes 4; outputs are counted
        as if they were split too. Each of their products reads and writes what one does.
        """
        if self.halves and kernel in PRODUCTS:
            return self.halves, 4
        return (2 if self.float32 else 1), 0


PRODUCTS = "products", "logits"  # kinds of kernel; attention's products stay as they are
BFLOAT16 = Arithmetic("bfloat16")
FLOAT32 = Arithmetic("float32", float32=True)
# x = hi + lo, both bfloat16: hi hi + lo hi + hi lo; two where every weight's lo is 0
SPLIT = Arithmetic("split", float32=True, halves=3)
SPLIT_EXACT = Arithmetic("split", float32=True, halves=2)


def part_hours(
    work: Work,
    gpu: GPU,
    *,
    utilisation: float = UTILISATION,
    bandwidth_share: float = BANDWIDTH_SHARE,
    arithmetic: Arithmetic = BFLOAT16,
) -> dict[str, float]:
    """GPU-hours of each part of the step."""
    hours = dict.fromkeys(PARTS, 0.0)
    bandwidth = gpu.bandwidth * bandwidth_share
    for (part, kernel), amount in work.items():
        meanwhile, before = (times * amount.bytes / bandwidth for times in arithmetic.moved(kernel))
        seconds = max(
            amount.flop / (arithmetic.rate(gpu, kernel) * utilisation),
            meanwhile,
            amount.link / gpu.link,
            amount.host / HOST_LINK + amount.host_memory / HOST_MEMORY,
        )
        hours[part] += (seconds + before) / 3600
    return hours


def hours(work: Work, gpu: GPU, **assumed) -> float:
    return sum(part_hours(work, gpu, **assumed).values())


def hours_at_full_rate(work: Work, gpu: GPU, *, arithmetic: Arithmetic = BFLOAT16) -> float:
    """GPU-hours if the GPU did nothing but what the model needs, at the rate of its data sheet."""
    needed = (
        amount.flop / arithmetic.rate(gpu, kernel)
        for (part, kernel), amount in work.items()
        if part in NEEDED
    )
    return sum(needed) / 3600
