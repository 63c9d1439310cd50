"""Tests that need a CUDA device; test_gpu_rehearsal.py runs the same checks where there is none."""

import os

import pytest
import torch

from bench import ledger, measure

# read with the first matrix product: without it cuBLAS refuses to be deterministic
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(config, items):
    if done := {line.removeprefix(ledger.DEAD) for line in ledger.lines()}:
        # by processes before this one, of which the last died in its last test
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = [item for item in items if item.nodeid not in done]
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_runtest_logstart(nodeid):
    ledger.at(nodeid)


broken = []  # tests since which the device is of no use


@pytest.hookimpl(trylast=True)  # so that the failure itself has been noted
def pytest_runtest_logreport(report):
    """After a failure: a device that is broken fails every test to come, and they are begun anew."""
    if report.failed and torch.cuda.is_available():
        try:
            measure.recover("cuda")
        except SystemExit:
            broken.append(report.nodeid)
            pytest.exit(f"the device is broken since {report.nodeid}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    if broken:
        session.exitstatus = ledger.BROKEN  # after an interruption failures are told, else not


@pytest.fixture(autouse=True)
def float32_products():
    """TF32 would round float32 inputs to 10 bits, and the comparisons with them."""
    torch.set_float32_matmul_precision("highest")
