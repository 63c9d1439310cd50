"""The methods with a KL and a mask on a GPU: as right as on the CPU, and without waiting."""

import pytest
import torch
from gpu import method_checks as checks
from gpu.wait_checks import nothing_waits

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("case", checks.CASES)
def test_values_and_gradients(case):
    checks.agrees(case, "cuda")


@pytest.mark.parametrize("case", checks.CASES)
def test_a_micro_batch_does_not_wait(case):
    torch.use_deterministic_algorithms(False)
    nothing_waits(case, checks.micro_batch(case, "cuda", torch.float32))
