"""split_linear's kernel, run on the CPU by Triton's interpreter on float32 stand-ins for bfloat16."""

import pytest
import torch

from sepo.ops import SplitWeight, split_linear, split_weight
from sepo_kernels import triton_split
from sepo_kernels.halves import error_bound
from sepo_kernels.split_linear.reference import products_of_bfloat16_halves

INF, NAN = float("inf"), float("nan")
MOST = torch.finfo(torch.float32).max * (1 - 2**-10)  # whose nearest bfloat16 is infinite


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles down and across; the last group of tiles is no whole one."""
    small = triton_split.Tile(BLOCK_N=16, BLOCK_V=16, BLOCK_D=16, GROUP=2)
    monkeypatch.setattr(triton_split, "TILE", small)


def standing_in(weight):
    """bfloat16 halves in float32: the interpreter has no bfloat16 products, and cuts off digits."""
    hi, lo = split_weight(weight)
    return SplitWeight(hi.float(), None if lo is None else lo.float())


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "shape", [(16, 16, 16), (37, 45, 53), (70, 5, 17), (1, 100, 1), (0, 16, 16)], ids=str
)
def test_within_the_bound(shape, exact):
    N, D, V = shape
    torch.manual_seed(0)
    x, weight, bias = torch.randn(N, D), torch.randn(V, D), torch.randn(V)
    weight = weight.bfloat16().float() if exact else weight
    split = standing_in(weight)
    assert split.products == (2 if exact else 3)
    found = split_linear(x, split, bias=bias, impl="triton")
    truth = x.double() @ weight.double().T + bias
    bound = error_bound(x, weight, "bfloat16", split.products) + 2**-23 * truth.abs()
    assert bool(((found - truth).abs() <= bound).all())
    again = split_linear(x, split, bias=bias, impl="triton")
    assert torch.equal(found, again)


def test_the_sum_that_is_defined():
    """Numbers n + m / 512, whose products of halves float32 adds without an error."""
    torch.manual_seed(0)
    draw = lambda *shape: torch.randint(4, 8, shape) + (torch.randint(2, shape) - 0.5) / 256
    x, weight = draw(37, 61), draw(20, 61)
    found = split_linear(x, standing_in(weight), impl="triton")
    assert torch.equal(found.double(), products_of_bfloat16_halves(x, weight))


def test_rows_that_are_no_multiple_of_16_bytes_apart():
    wide = torch.randn(20, 40)
    x, split = wide[:, 1:38], standing_in(torch.randn(9, 37))
    found, straight = (split_linear(y, split, impl="triton") for y in (x, x.contiguous()))
    assert torch.equal(found, straight)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
@pytest.mark.parametrize("value", [INF, -INF, NAN, MOST, -MOST])
@pytest.mark.parametrize("other", [1.0, -0.5, 0.0])
def test_not_finite_where_float32_is_not(value, other):
    x, weight = torch.tensor([[value, 0.5]]), torch.tensor([[other, 0.25], [0.125, other]])
    for a, b in ((x, weight), (weight, x)):
        found = split_linear(a, standing_in(b), impl="triton")
        assert_alike(found, a @ b.T)


def assert_alike(found, plain):
    assert torch.equal(found.isfinite(), plain.isfinite())
    known = plain.isfinite()
    torch.testing.assert_close(found[known], plain[known], rtol=2**-14, atol=1e-38)
