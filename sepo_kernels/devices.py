"""What the hardware wants, in one place. Imports torch only, so that `import sepo.ops` is cheap."""

import importlib.util
import os
import time
from functools import cache

import torch

# read at import: Dynamo traces the readers, and cannot trace a look at the environment; Triton
# reads the same variable when a kernel is defined
TRITON = importlib.util.find_spec("triton") is not None
INTERPRET = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of every sum over D, V or M: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


# of a GPU that is not here, of which there are fake tensors all the same: an H100's
ABSENT_GPU = (132, 80 << 30)


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 0 for a CPU."""
    return _gpu(device)[0] if device.type == "cuda" else 0


def memory(device: torch.device) -> int:
    """Bytes of a GPU's memory, free or not; 0 for a CPU."""
    return _gpu(device)[1] if device.type == "cuda" else 0


# Dynamo, which traces the readers, takes what it returns as it is
@torch.compiler.assume_constant_result
def _gpu(device: torch.device) -> tuple[int, int]:
    if not torch.cuda.is_available():
        return ABSENT_GPU
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.total_memory


ROW_BYTES = 128  # a GPU's cache line


def row_stride(columns: int, dtype: torch.dtype, gpu: bool) -> int:
    """Entries from one row of a block to the next.

    On a GPU rows begin at cache lines, for any vocabulary: one that is no multiple of 16 bytes
    would be read a number at a time, by kernels and by the library's products.
    """
    if not gpu:
        return columns
    entries = ROW_BYTES // dtype.itemsize
    return -(-columns // entries) * entries


# of a CPU that torch's library products have instructions for; by its features and not measured,
# since a run that is resumed must round as it did before
BFLOAT16_PRODUCTS = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
)


def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch's products on this CPU take `dtype` as it is, and not a number at a time."""
    return dtype == accumulator(dtype) or (dtype == torch.bfloat16 and BFLOAT16_PRODUCTS)


@cache
def bfloat16_speed(device_type: str) -> float:
    """How many times as fast as float32 this machine multiplies bfloat16: below 1, it is slower.

    A CPU is measured, once a process and in milliseconds: its features don't tell, nor do those
    that torch's libraries are told to do without. An RTX 30 or an A100 and later have bfloat16 units.
    """
    if device_type != "cpu":
        fast = device_type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
        return float("inf") if fast else 0.0
    a = torch.ones(256, 256)
    return _seconds_of_product(a) / _seconds_of_product(a.bfloat16())


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """What to multiply in where either would do: bfloat16 where it is no slower than float32."""
    return torch.bfloat16 if bfloat16_speed(torch.device(device).type) >= 1 else torch.float32


def _seconds_of_product(a: torch.Tensor) -> float:
    a @ a  # compiles its kernel
    best = float("inf")  # the least of a few: neighbours only ever slow a product down
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return best


def why_not_triton(x: torch.Tensor) -> str | None:
    """None if the Triton row kernels can run on `x`'s device in its dtype, else the reason."""
    if not TRITON:
        return "triton is not installed: pip install triton"
    if not (x.is_cuda or INTERPRET):
        return f"triton needs a GPU, or TRITON_INTERPRET=1 at import, got tensors on {x.device}"
    if accumulator(x.dtype) != torch.float32:
        return f"the Triton kernels compute in float32, got {x.dtype}"
    return None
