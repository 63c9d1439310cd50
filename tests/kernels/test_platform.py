"""Which dtype a machine multiplies fast."""

import subprocess
import sys

import pytest
import torch
from processes import ENVIRONMENT

from sepo_kernels import devices

AVX2_ALONE = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


def test_the_old_name_is_the_same_module():
    import sepo_kernels.platform
    from sepo_kernels.platform import fast_dtype

    assert sepo_kernels.platform is devices and fast_dtype is devices.fast_dtype


def test_a_cpu_without_bfloat16_products_is_found_out():
    code = (
        "from sepo_kernels import devices; print(devices.bfloat16_speed('cpu'), "
        "devices.fast_dtype('cpu'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=ENVIRONMENT | AVX2_ALONE,
        capture_output=True,
        text=True,
        check=True,
    )
    speed, dtype = done.stdout.split()
    assert 0 < float(speed) < 0.5 and dtype == "torch.float32"


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
