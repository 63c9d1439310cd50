"""Products of halves are what float32's would be, within a bound that grows with the inner width."""

import pytest
import torch
from native_kernels import LACKING
from numerics import max_error
from ops import implementations
from torch.utils.flop_counter import FlopCounterMode

from sepo.ops import (
    SplitWeight,
    explain_split_linear,
    selected_logprob,
    split_linear,
    split_logprob,
    split_weight,
)
from sepo_kernels import devices, extension
from sepo_kernels.halves import KINDS, error_bound, halves, to_tf32
from sepo_kernels.selected_logprob import IMPLS as HEAD_IMPLS
from sepo_kernels.selected_logprob.reference import selected_logprob as logprob_reference
from sepo_kernels.split_linear import IMPLS, reference

INF, NAN = float("inf"), float("nan")
MOST = torch.finfo(torch.float32).max * (1 - 2**-10)  # whose nearest bfloat16 is infinite
kinds = pytest.mark.parametrize("kind", KINDS)


def of_kind(kind):
    """Names of the implementations that multiply such halves: the native one bfloat16's alone."""
    names = implementations.parameters(IMPLS)
    return [name for name in names if kind == "bfloat16" or name.values != ("native",)]


def can_run(impl: str) -> str:
    if impl == "native" and not extension.BFLOAT16_TILES:
        pytest.skip("no bfloat16 tiles here")
    return impl


@pytest.fixture(params=of_kind("bfloat16"))
def impl(request):
    return can_run(request.param)


@pytest.fixture(
    params=[
        pytest.param((kind, *name.values), marks=name.marks)
        for kind in KINDS
        for name in of_kind(kind)
    ],
    ids="-".join,
)
def kind_and_impl(request):
    kind, impl = request.param
    return kind, can_run(impl)


def operands(N, D, V, *, exact=False):
    """Rows and weights of many magnitudes; weights that bfloat16 holds exactly, if asked for."""
    torch.manual_seed(D)
    x = torch.randn(N, D) * torch.logspace(-3, 3, N)[:, None]
    weight = torch.randn(V, D) * torch.logspace(-2, 2, D)
    return x, weight.bfloat16().float() if exact else weight


def exact_sums(N, D, V):
    """Numbers n + m / 512 whose products of halves float32 adds without an error."""
    torch.manual_seed(0)
    draw = lambda *shape: torch.randint(4, 8, shape) + (torch.randint(2, shape) - 0.5) / 256
    return draw(N, D), draw(V, D)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(3, 1, 5), (8, 64, 31), (4, 1000, 9), (2, 5000, 3), (0, 8, 4), (700, 35, 131), (65, 70, 64)],
)
def test_within_the_bound(kind_and_impl, exact, shape):
    kind, impl = kind_and_impl
    x, weight = operands(*shape, exact=exact)
    split, bias = split_weight(weight, kind=kind), torch.randn(shape[2])
    assert split.products == (2 if exact else 3)
    found = split_linear(x, split, bias=bias, impl=impl)
    truth = reference.split_linear(x.double(), weight.double(), bias.double())
    bound = error_bound(x, weight, kind, split.products) + 2**-23 * truth.abs()
    assert found.dtype == torch.float32 and bool(((found - truth).abs() <= bound).all())


def test_halves_whose_columns_are_contiguous(impl):
    x, weight = operands(9, 70, 40)
    hi, lo = split_weight(weight)
    turned = SplitWeight(hi.T.contiguous().T, lo.T.contiguous().T)
    straight = split_linear(x, SplitWeight(hi, lo), impl=impl)
    torch.testing.assert_close(split_linear(x, turned, impl=impl), straight, rtol=1e-5, atol=1e-5)


@kinds
def test_without_sums_the_bound_is_nearly_reached(kind):
    """Of a million products one errs by more than a third of it: no bit is wasted or lost."""
    x, weight = torch.rand(1000, 1) + 1, torch.rand(1000, 1) + 1
    error = (
        split_linear(x, split_weight(weight, kind=kind)) - x.double() @ weight.double().T
    ).abs()
    share = (error / (error_bound(x, weight, kind, 3) - 1.01 * 3 * 2**-23 * x @ weight.T)).max()
    assert (0.3 if kind == "bfloat16" else 0) < share
    assert bool((error <= error_bound(x, weight, kind, 3)).all())


def test_three_products_are_the_sum_that_is_defined(impl):
    x, weight = exact_sums(7, 64, 9)
    found = split_linear(x, split_weight(weight), impl=impl).double()
    assert torch.equal(found, reference.products_of_bfloat16_halves(x, weight))
    assert not torch.equal(found, x.double() @ weight.double().T)  # lo lo is left out


def test_a_checkpoint_in_bfloat16_takes_two_products(impl):
    x, weight = exact_sums(7, 64, 9)
    weight = weight.bfloat16().float()
    split = split_weight(weight)
    assert split.lo is None and torch.equal(split.hi.float(), weight)
    assert torch.equal(split_linear(x, split, impl=impl).double(), x.double() @ weight.double().T)
    weight[3, 5] += 2**-9  # one number is enough
    assert split_weight(weight).products == 3


@kinds
def test_halves_of_every_magnitude(kind):
    x = torch.randn(10_000) * torch.logspace(-30, 37, 10_000)
    hi, lo = halves(x, kind)
    left = 2.0 ** (-2 * KINDS[kind].bits)
    assert bool(((hi.double() + lo.double() - x).abs() <= left * x.abs().double()).all())
    digits = hi.double().frexp()[0] * 2 ** KINDS[kind].bits
    assert torch.equal(digits, digits.round())


@pytest.mark.parametrize("value", [INF, -INF, NAN, MOST, -MOST, 0.0])
@pytest.mark.parametrize("other", [1.0, -0.5, 0.0, INF, NAN, 2.0**-100])
def test_not_finite_where_float32_is_not(kind_and_impl, value, other):
    kind, impl = kind_and_impl
    given = torch.tensor([[value, 0.5]]), torch.tensor([[other, 0.25], [0.125, other]])
    for x, weight in (given, given[::-1]):
        found, plain = split_linear(x, split_weight(weight, kind=kind), impl=impl), x @ weight.T
        known = plain.isfinite()
        assert torch.equal(found.isfinite(), known)
        torch.testing.assert_close(found[known], plain[known], rtol=2**-14, atol=1e-38)


def test_tf32_of_numbers_that_are_not_finite():
    odd = torch.tensor([INF, -INF, NAN, -1.5])
    all_ones = torch.tensor([-1]).view(torch.float32)  # a NaN whose bits overflow when rounded up
    assert torch.equal(to_tf32(odd).nan_to_num(7.0), odd.nan_to_num(7.0))
    assert to_tf32(all_ones).isnan().all()


@pytest.mark.parametrize("options", [{}, dict(scale=0.25), dict(softcap=3.0)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("head_impl", implementations.on_cpu(HEAD_IMPLS))
@kinds
def test_a_head_of_halves(kind, head_impl, with_bias, options):
    hidden, weight = operands(11, 48, 101)
    hidden /= hidden.norm(dim=1, keepdim=True)
    bias = torch.randn(101) if with_bias else None
    rows, targets = torch.arange(11).repeat(2), torch.arange(22)
    double = lambda t: None if t is None else t.double()
    truth = logprob_reference(
        hidden.double(), weight.double(), rows, targets, bias=double(bias), **options
    )
    more = dict(bias=bias, impl=head_impl, **options)
    found = split_logprob(hidden, split_weight(weight, kind=kind), rows, targets, **more)
    plain = selected_logprob(hidden, weight, rows, targets, **more)
    logits = error_bound(hidden, weight, kind, 3).max() + 2**-16 * with_bias * 4
    assert max_error(found, truth) <= 2 * logits + 2 * max_error(plain, truth)
    rounded = selected_logprob(hidden.bfloat16().float(), weight, rows, targets, **more)
    assert max_error(found, truth) < max_error(rounded, truth) / 10


def test_the_sum_is_a_matter_of_bits_and_not_of_the_callers_settings():
    """What speeds a CPU's products up is switched on for them alone."""
    matmul = torch.backends.mkldnn.matmul
    before, (x, weight) = matmul.fp32_precision, operands(9, 300, 40)
    split = split_weight(weight)
    first = split_linear(x, split)
    try:
        for precision in ("bf16", "ieee"):
            matmul.fp32_precision = precision
            assert torch.equal(split_linear(x, split), first)
            assert matmul.fp32_precision == precision
    finally:
        matmul.fp32_precision = before
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(split_linear(x, split), first)


@pytest.mark.parametrize("exact", [False, True])
def test_operator_registration_and_its_flop(impl, exact):
    x, weight = operands(5, 16, 7, exact=exact)
    hi, lo = split_weight(weight)
    torch.library.opcheck(torch.ops.sepo.split_linear.default, (x, hi, lo, torch.ones(7), impl))
    with FlopCounterMode(display=False) as counter:
        split_linear(x, SplitWeight(hi, lo), impl=impl)
    assert counter.get_total_flops() == 2 * 5 * 16 * 7 * (2 if exact else 3)


@pytest.mark.parametrize("known", [False, True])
def test_explained(monkeypatch, known):
    monkeypatch.setattr(devices, "BFLOAT16_GEMMS", known)
    monkeypatch.setattr(extension, "BFLOAT16_TILES", known)
    x, weight = operands(2, 8, 4, exact=True)
    found = explain_split_linear(x, split_weight(weight))
    impl = "native" if known and not LACKING else "library"
    assert (found.impl, found.products, found.emulated) == (impl, 2, not known)
    assert "zero everywhere: 2 products" in found.reasons[0]
    assert ("no bfloat16 instructions here" in found.reasons[1]) is not known
    assert explain_split_linear(x, split_weight(weight, kind="tf32")).emulated


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.ones(3, 5)), r"expected \(N, D\) and a weight \(V, D\), got \(3, 5\) and"),
        (
            dict(x=torch.ones(3, 4).double()),
            "expected torch.float32, of which .* got torch.float64",
        ),
        (dict(x=torch.ones(4, 3).T), "expected contiguous rows, got strides"),
        (dict(bias=torch.ones(5)), r"expected bias \(6,\) torch.float32, got \(5,\)"),
        (dict(x=torch.ones(3, 4, device="meta")), "expected all tensors on one device"),
        (dict(x=torch.ones(3, 4, requires_grad=True)), "call it under torch.no_grad"),
        (
            dict(impl="cublas"),
            'unknown impl "cublas", expected one of: auto, native, library, triton',
        ),
        (dict(impl="triton"), 'impl="triton" cannot run here: triton needs a GPU'),
    ],
    ids=str,
)
def test_refusals(change, message):
    arguments = dict(x=torch.ones(3, 4), weight=split_weight(torch.ones(6, 4))) | change
    with pytest.raises(ValueError, match=message):
        split_linear(arguments.pop("x"), arguments.pop("weight"), **arguments)


def test_refused_weights():
    for weight in (torch.ones(4), torch.ones(2, 2).bfloat16()):
        with pytest.raises(ValueError, match=r"expected weight \(V, D\) torch.float32, got"):
            split_weight(weight)
    with pytest.raises(ValueError, match="expected kind to be one of bfloat16, tf32, got fp8"):
        split_weight(torch.ones(2, 2), kind="fp8")
    with pytest.raises(ValueError, match="call it under torch.no_grad"):
        some = torch.zeros(2, dtype=torch.int64)
        hidden = torch.ones(3, 4, requires_grad=True)
        split_logprob(hidden, split_weight(torch.ones(6, 4)), some, some)
