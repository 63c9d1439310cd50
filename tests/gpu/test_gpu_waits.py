"""No operation of a training step waits for the GPU."""

from contextlib import contextmanager

import pytest
import torch
from gpu import step_checks

# entering the mode warns that it is a prototype
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


@contextmanager
def waiting_is_an_error():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def as_in_training():
    torch.use_deterministic_algorithms(False)


def test_a_wait_is_noticed():
    x = torch.ones(3, device="cuda")
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchroniz"):
        x.sum().item()


@pytest.mark.parametrize("impl", ["triton", "chunked"])
def test_heads_do_not_wait(impl):
    for name, call in step_checks.calls(impl, "cuda").items():
        nothing_waits(name, call)


def test_segments_do_not_wait():
    for name, call in step_checks.segment_calls("cuda").items():
        nothing_waits(name, call)


def nothing_waits(name, call):
    call()  # what is compiled and reserved at the first call may wait
    with waiting_is_an_error():
        try:
            call()
        except RuntimeError as error:
            pytest.fail(f"{name}: {error}")
