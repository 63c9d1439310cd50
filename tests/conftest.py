import gc
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import: no test looks for a hub

import pytest
import torch

# an assertion of theirs shows its values too
HELPERS = (Path(__file__).parent / "helpers").glob("*.py")
pytest.register_assert_rewrite("trainer", *(path.stem for path in HELPERS))

# the tensors are small: threads would wait for each other longer than they work
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Files with slow tests go first: in the end no worker is left alone with one of them."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    """What is imported by now lives on: a trainer's gc.collect() need not walk it, half of its time."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item):
    """Skip what is marked `native` where the native kernels were left out."""
    if item.get_closest_marker("native"):
        from native_kernels import LACKING  # by then every test has said how sepo is imported

        if LACKING:
            pytest.skip(LACKING)


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers, whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty starts as NaN, so an output that a kernel forgot to write is found at once."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
