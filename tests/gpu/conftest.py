"""Tests that need a CUDA device; test_gpu_rehearsal.py runs the same checks where there is none."""

import os

import pytest
import torch

# read with the first matrix product: without it cuBLAS refuses to be deterministic
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def float32_products():
    """TF32 would round float32 inputs to 10 bits, and the comparisons with them."""
    torch.set_float32_matmul_precision("highest")
