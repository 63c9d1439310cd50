"""The CUDA kernels over segments, and PyTorch's in their place, against the definitions."""

import pytest
import torch
from gpu import segment_checks as checks

pytestmark = pytest.mark.gpu

SIDES = ["highest", "lowest", "alternate"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
TOPK = ["native", "sorting"]


@pytest.mark.parametrize("impl", TOPK)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("lengths", [checks.RAGGED, checks.SHORT, (0,), ()], ids=len)
def test_topk_is_the_definition(lengths, side, dtype, impl):
    checks.topk(impl, "cuda", lengths, dtype, side)


@pytest.mark.parametrize("impl", TOPK)
@pytest.mark.parametrize("fraction", [1e-6, 0.29, 1.0])
def test_topk_of_a_million_tokens(fraction, impl):
    checks.topk(impl, "cuda", (1_000_000, 3, 1), torch.float32, "alternate", fraction)


@pytest.mark.parametrize("impl", ["native", "offsets"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lengths", [checks.RAGGED, checks.SHORT], ids=len)
def test_sums_are_the_definition(lengths, dtype, impl):
    checks.sums(impl, "cuda", lengths, dtype)
