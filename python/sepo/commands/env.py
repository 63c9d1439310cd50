"""`sepo env`: versions and devices, for a bug report."""

import argparse
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

PACKAGES = (
    "torch", "transformers", "accelerate", "datasets", "pyarrow", "numpy", "triton", "peft", "trl",
    "liger-kernel", "flash-attn", "bitsandbytes", "deepspeed", "cut-cross-entropy",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add none: `sepo env` has no flags."""


def run(args: argparse.Namespace) -> None:
    """Print what a bug report needs. What can't be found out is a line that says why."""
    import sepo

    print(f"sepo {sepo.__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in PACKAGES:
        _show(name, partial(version, name))
    _show("compiler", lambda: _first_line(os.environ.get("CXX") or "c++", "--version"))
    _show("nvcc", lambda: _first_line("nvcc", "--version", last=True))
    _show(
        "driver",
        lambda: _first_line(*"nvidia-smi --query-gpu=driver_version --format=csv,noheader".split()),
    )
    _show("CUDA", lambda: _torch().version.cuda or "torch was built without it")
    _show("devices", _devices)
    for device in ("cpu", "cuda"):
        _show(f"extension on {device}", partial(_extension, device))
    for device in ("cpu", *["cuda"] * _has_cuda()):
        _show(f"{device}, fast in", partial(_fast_dtype, device))
        for dtype in ("bfloat16", "float32"):
            _show(f"{device}, {dtype}", partial(_implementations, device, dtype))


def _show(name: str, find: Callable[[], str]) -> None:
    try:
        found = find()
    except PackageNotFoundError:
        found = "not installed"
    except Exception as error:  # of a broken installation, which is what the report is about
        found = (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        )
    print(f"{name}: {found}")


def _first_line(*command: str, last: bool = False) -> str:
    """Of a program's output; the last line where the first is its name."""
    if shutil.which(command[0]) is None:
        return "not found"
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    lines = (done.stdout.strip() or done.stderr.strip() or f"exit {done.returncode}").splitlines()
    return lines[-1 if last else 0]


def _torch():
    import torch

    return torch


def _has_cuda() -> bool:
    try:
        return _torch().cuda.is_available()
    except Exception:
        return False


def _devices() -> str:
    torch = _torch()
    found = [f"{torch.get_num_threads()} CPU threads, {torch.backends.cpu.get_cpu_capability()}"]
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        capability, size = f"{device.major}.{device.minor}", device.total_memory >> 30
        found.append(f"{device.name} (capability {capability}, {size} GiB)")
    return "; ".join(found)


def _extension(device: str) -> str:
    from sepo_kernels import extension

    missing = extension.why_not("native_segment_sum", _torch().device(device))
    return missing or (extension.in_force() if device == "cpu" else "built")


def _fast_dtype(device: str) -> str:
    """Name the dtype that `--bf16 auto` takes, and why."""
    _torch()
    from sepo_kernels.devices import bfloat16_speed, fast_dtype

    speed = bfloat16_speed(device)
    found = str(fast_dtype(device)).removeprefix("torch.")
    # a GPU isn't measured: it has units for bfloat16 or emulates them
    return found + f", bfloat16 at {speed:.2g} times float32's rate" * (device == "cpu")


def _implementations(device: str, dtype_name: str) -> str:
    """Name the implementations that `auto` takes for tensors on this device."""
    torch = _torch()
    from sepo_kernels import segment_topk, selected_logprob, selected_logprob_kl
    from sepo_kernels.registry import pick

    dtype = getattr(torch, dtype_name)
    x, ids = torch.empty(1, 1, device=device, dtype=dtype), torch.zeros(1, dtype=torch.int32)
    chosen = {
        "head": pick(selected_logprob.IMPLS, "auto", x, x),
        "head with KL": pick(selected_logprob_kl.IMPLS, "auto", x, x),
        "top-k": pick(segment_topk.IMPLS, "auto", x[0], ids),
    }
    takes = {name: impl.name + " fused" * impl.fused(dtype) for name, impl in chosen.items()}
    takes["attention"] = _attention(x)
    return ", ".join(f"{operation} {name}" for operation, name in takes.items())


def _attention(x) -> str:
    if find_spec("transformers") is None:  # it is a function of transformers' interface
        return "needs transformers"
    from sepo import attention

    terms = attention.Terms(device=x.device, dtype=x.dtype, width=64, value_width=64, gradient=True)
    return attention.choose("auto", terms).name
