"""Products of 16-bit operands on a CPU that multiplies only wider ones."""

import pytest
import torch

import sepo.ops as ops
from sepo_kernels import extension, platform, products


@pytest.fixture(autouse=True)
def no_bfloat16_instructions(monkeypatch):
    monkeypatch.setattr(platform, "BFLOAT16_PRODUCTS", False)
    monkeypatch.setattr(extension, "BFLOAT16_TILES", False)
    monkeypatch.setattr(products, "WIDE_TILE_BYTES", 1 << 12)  # several tiles of what is small


@pytest.fixture
def library_products(monkeypatch):
    """The dtypes that torch.mm and addmm_ were asked to multiply in."""
    asked = []
    for place, name in ((torch, "mm"), (torch.Tensor, "__matmul__"), (torch.Tensor, "addmm_")):
        real = getattr(place, name)

        def watched(*args, real=real, **options):
            asked.extend(x.dtype for x in args if isinstance(x, torch.Tensor))
            return real(*args, **options)

        monkeypatch.setattr(place, name, watched)
    return asked


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 500, 30), (500, 7, 30), (3, 0, 5), (0, 3, 5)], ids=str)
def test_operands_are_widened_and_the_sum_is_rounded_once(shape, dtype, library_products):
    m, k, n = shape
    a, b = torch.randn(k, m).to(dtype).T, torch.randn(k, n).to(dtype)
    exact = a.double() @ b.double()
    library_products.clear()
    found = products.product(a, b)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6 * (k + 1))
    out = torch.empty(n, m, dtype=dtype).T  # of any layout
    assert products.product(a, b, out=out) is out
    torch.testing.assert_close(
        out, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6 * (k + 1)
    )
    assert set(library_products) <= {torch.float32}


def test_no_product_of_a_head_is_in_bfloat16(library_products):
    hidden = torch.randn(40, 24).bfloat16().requires_grad_()
    weight = torch.randn(300, 24).bfloat16().requires_grad_()
    bias = torch.randn(300).bfloat16().requires_grad_()
    rows = torch.arange(40, dtype=torch.int32)
    targets = torch.randint(300, (40,))
    ref = torch.randn(40, 16).bfloat16(), torch.randn(300, 16).bfloat16()
    for budget in (1 << 30, 1 << 14):  # save, recompute
        ops.selected_logprob(
            hidden, weight, rows, targets, bias=bias, budget=budget
        ).sum().backward()
        found = ops.selected_logprob_kl(
            hidden, weight, *ref, rows, targets, bias=bias, direction="ref||policy", budget=budget
        )
        sum(x.sum() for x in found).backward()
    frozen = ops.selected_logprob(hidden, weight.detach(), rows, targets)
    frozen.sum().backward()
    assert library_products and set(library_products) == {torch.float32}
