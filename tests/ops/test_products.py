"""Products of 16-bit operands on a CPU that multiplies only wider ones."""

import pytest
import torch

import sepo.ops as ops
from sepo_kernels import devices, extension, gemm


@pytest.fixture(autouse=True)
def no_bfloat16_instructions(monkeypatch):
    monkeypatch.setattr(devices, "BFLOAT16_GEMMS", False)
    monkeypatch.setattr(extension, "BFLOAT16_TILES", False)
    monkeypatch.setattr(gemm, "WIDE_TILE_BYTES", 1 << 12)  # several tiles of what is small


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
    found = gemm.gemm(a, b)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6 * (k + 1))
    out = torch.empty(n, m, dtype=dtype).T  # of any layout
    assert gemm.gemm(a, b, out=out) is out
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


def within(total, a, b):
    """gemm.add_gemm as it is on a GPU in float32, on a CPU: the library adds to what is there."""
    total.addmm_(a, b)


@pytest.mark.parametrize("k", [7, 128, 256, 1000, 2000])
def test_a_sum_within_the_product_is_that_beside_it_to_one_unit_in_the_last_place(k):
    """In units of the largest number that is rounded on the way: a sum may cancel.

    Both multiply the same blocks of k (192 long with AVX-512), and add these in another order:
    within, total + p1 + p2 + ..., beside it, total + (p1 + p2 + ...). So from two blocks on a sum
    that cancels differs by many of its own units. It is as near to float64 at first; once the total
    outgrows the products each block rounds it again: after five chunks of 2000 its error is 1.5
    times the other's, on a CPU, where only this test takes it.
    """
    total, a, b = torch.randn(61, 40), torch.randn(61, k), torch.randn(k, 40)
    beside, inside = total.clone(), total.clone()
    for _ in range(5):  # as many chunks
        exact = beside.double() + a.double() @ b.double()
        largest = beside.abs() + a.abs() @ b.abs()
        gemm.add_gemm(beside, a, b)
        within(inside, a, b)
        unit = torch.nextafter(largest, torch.full_like(largest, torch.inf)) - largest
        assert ((inside.double() - beside.double()).abs() <= unit.double()).all()
        error, other = ((x.double() - exact).abs().mean() for x in (inside, beside))
        assert error <= 2 * other
        inside.copy_(beside)


def test_gradients_summed_within_the_products_are_as_accurate(monkeypatch):
    """Chunks of a recomputing head, both ways, against float64; the one way to one unit of the other."""
    from sepo_kernels.selected_logprob import loops

    hidden, weight = torch.randn(40, 24), torch.randn(300, 24)
    rows, targets = torch.arange(40, dtype=torch.int32), torch.randint(300, (40,))

    def gradients(dtype, budget):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        logp = ops.selected_logprob(*leaves, rows, targets, budget=budget, impl="chunked")
        return torch.autograd.grad(logp.sum(), leaves)

    beside, exact = gradients(torch.float32, 5 * 4 * 300), gradients(torch.float64, 1 << 30)
    calls = []
    monkeypatch.setattr(loops, "add_gemm", lambda *x: (calls.append(x), within(*x)))
    inside = gradients(torch.float32, 5 * 4 * 300)
    assert len(calls) == 7  # eight chunks, the first of which is written and not added
    for one, other, true in zip(inside, beside, exact, strict=True):
        unit = torch.finfo(torch.float32).eps * true.abs().max()
        assert (one - other).abs().max() <= unit
        assert (one - true).abs().max() <= (other - true).abs().max() + unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_written_in_either_dtype(dtype):
    a, b = torch.randn(7, 20).to(dtype), torch.randn(20, 5).to(dtype)
    out = torch.full((7, 5), torch.nan)
    assert gemm.gemm(a, b, out=out) is out
    assert torch.equal(out, gemm.gemm(a, b).float())
