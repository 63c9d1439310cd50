"""Facts about CPUs and GPUs that decide dtypes, strides and chunk sizes.

Imports torch alone, so that `import sepo.ops` is cheap.
"""

import importlib.util
import os
import time
from functools import cache

import torch

# read at import: Dynamo traces the functions that use these, and cannot trace the environment;
# Triton reads the same variable when a kernel is defined
TRITON = importlib.util.find_spec("triton") is not None
INTERPRET = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of every sum over D, V or M: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


# multiprocessors and bytes of an H100: fake tensors may be on a GPU that this machine lacks
ABSENT_GPU = (132, 80 << 30)


def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has; 0 for a CPU."""
    return _gpu(device)[0] if device.type == "cuda" else 0


def memory(device: torch.device) -> int:
    """Return the bytes of a GPU's memory, free or not; 0 for a CPU."""
    return _gpu(device)[1] if device.type == "cuda" else 0


# Dynamo takes the result for a constant instead of tracing the query
@torch.compiler.assume_constant_result
def _gpu(device: torch.device) -> tuple[int, int]:
    if not torch.cuda.is_available():
        return ABSENT_GPU
    gpu = torch.cuda.get_device_properties(device)
    return gpu.multi_processor_count, gpu.total_memory


ROW_BYTES = 128  # a GPU's cache line


def row_stride(columns: int, dtype: torch.dtype, gpu: bool) -> int:
    """Return the entries from one row of a block to the next.

    On a GPU rows begin at cache lines, for any vocabulary: one that is no multiple of 16 bytes
    would be read a number at a time, by kernels and by the library's GEMMs.
    """
    if not gpu:
        return columns
    entries = ROW_BYTES // dtype.itemsize
    return -(-columns // entries) * entries


def row_bytes(columns: int, dtype: torch.dtype, gpu: bool) -> int:
    """Return the bytes from one row of a block to the next."""
    return row_stride(columns, dtype, gpu) * dtype.itemsize


# whether torch's libraries have bfloat16 instructions for this CPU. Read from its features, not
# measured: a run that is resumed must round as it did before
BFLOAT16_GEMMS = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
)


def multiplies(dtype: torch.dtype) -> bool:
    """Return whether torch's GEMMs on this CPU take `dtype` as it is, not a number at a time."""
    return dtype == accumulator(dtype) or (dtype == torch.bfloat16 and BFLOAT16_GEMMS)


@cache
def bfloat16_speed(device_type: str) -> float:
    """Return how many times as fast as float32 a device multiplies bfloat16; below 1 it is slower.

    A CPU is measured, once a process and in milliseconds: neither its features nor the settings of
    torch's libraries tell. A GPU has infinity where it has bfloat16 units (RTX 30, A100 and later),
    else 0.
    """
    if device_type != "cpu":
        fast = device_type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
        return float("inf") if fast else 0.0
    a = torch.ones(256, 256)
    return _gemm_seconds(a) / _gemm_seconds(a.bfloat16())


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """Return bfloat16 where it is multiplied no slower than float32, else float32."""
    return torch.bfloat16 if bfloat16_speed(torch.device(device).type) >= 1 else torch.float32


def _gemm_seconds(a: torch.Tensor) -> float:
    """Return the CPU time of a GEMM on one thread: on a busy machine several wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a @ a  # compiles its kernel
        best = float("inf")  # the least of a few: neighbours only ever slow a GEMM down
        for _ in range(5):
            start = time.thread_time()
            a @ a
            best = min(best, time.thread_time() - start)
        return best
    finally:
        torch.set_num_threads(threads)


def why_not_short_products(device: torch.device, kind: str) -> str | None:
    """Return why `device` has no products of bfloat16 or TF32 numbers with float32 sums, or None."""
    if device.type == "cpu":
        if kind == "bfloat16" and BFLOAT16_GEMMS:
            return None
        return f"no {kind} instructions here: halves are multiplied in float32, which is slower"
    if device.type == "cuda" and not _has_tensor_cores(device):
        return f"expected a GPU of compute capability 8.0 or more for {kind} products"
    return None if device.type == "cuda" else f"no {kind} products known of a {device.type}"


# Dynamo takes the result for a constant instead of tracing the query
@torch.compiler.assume_constant_result
def _has_tensor_cores(device: torch.device) -> bool:
    """Return whether a GPU multiplies bfloat16 and TF32: since NVIDIA's A100, or AMD's bfloat16."""
    if not torch.cuda.is_available():
        return True  # ABSENT_GPU does
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def why_not_triton(x: torch.Tensor) -> str | None:
    """Return why the Triton row kernels cannot run on `x`'s device in its dtype, or None."""
    if not TRITON:
        return "triton is not installed: pip install triton"
    if not (x.is_cuda or INTERPRET):
        return f"triton needs a GPU, or TRITON_INTERPRET=1 at import, got tensors on {x.device}"
    if accumulator(x.dtype) != torch.float32:
        return f"the Triton kernels compute in float32, got {x.dtype}"
    return None
