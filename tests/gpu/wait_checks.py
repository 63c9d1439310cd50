"""A call in which nothing waits for the GPU."""

from contextlib import contextmanager

import pytest
import torch


@contextmanager
def waiting_is_an_error():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def nothing_waits(name, call):
    call()  # what is compiled and reserved at the first call may wait
    with waiting_is_an_error():
        try:
            call()
        except RuntimeError as error:
            pytest.fail(f"{name}: {error}")
