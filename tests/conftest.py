import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import: no test looks for a hub

import pytest
import torch

# the tensors are small: threads would wait for each other longer than they work
torch.set_num_threads(1)


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
