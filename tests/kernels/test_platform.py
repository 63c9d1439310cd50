"""Which dtype a machine multiplies fast."""

import os
import subprocess
import sys

import pytest
import torch
from processes import AVX2_ALONE, ENVIRONMENT

from sepo_kernels import devices


def test_the_old_name_is_the_same_module():
    import sepo_kernels.platform
    from sepo_kernels.platform import fast_dtype

    assert sepo_kernels.platform is devices and fast_dtype is devices.fast_dtype


def measured(**environment) -> tuple[float, str]:
    code = (
        "from sepo_kernels import devices; print(devices.bfloat16_speed('cpu'), "
        "devices.fast_dtype('cpu'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=ENVIRONMENT | AVX2_ALONE | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    speed, dtype = done.stdout.split()
    return float(speed), dtype


def test_a_cpu_without_bfloat16_products_is_found_out():
    speed, dtype = measured()
    assert 0 < speed < 0.5 and dtype == "torch.float32"


def test_neighbours_do_not_change_what_is_fast():
    """Threads that wait for each other took all of the time, and the ratio was 0.008 to 1.3."""
    spin = [sys.executable, "-c", "import time\nwhile time.process_time() < 60: pass"]
    neighbours = [subprocess.Popen(spin) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        found = [measured(OMP_NUM_THREADS="2") for _ in range(3)]
    finally:
        for process in neighbours:
            process.kill()
            process.wait()
    assert all(0 < speed < 0.5 and dtype == "torch.float32" for speed, dtype in found), found


def test_the_threads_are_as_before():
    threads = torch.get_num_threads()
    devices._gemm_seconds(torch.ones(8, 8))
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("seconds", "fast"), [((2.0, 1.0), torch.bfloat16), ((1.0, 2.0), torch.float32)]
)
def test_the_dtype_that_takes_less_is_taken(monkeypatch, seconds, fast):
    of = dict(zip((torch.float32, torch.bfloat16), seconds, strict=True))
    monkeypatch.setattr(devices, "_gemm_seconds", lambda a: of[a.dtype])
    devices.bfloat16_speed.cache_clear()
    try:
        assert devices.fast_dtype("cpu") == devices.fast_dtype(torch.device("cpu")) == fast
        assert devices.bfloat16_speed("cpu") == seconds[0] / seconds[1]
    finally:
        devices.bfloat16_speed.cache_clear()  # of the pretended machine
