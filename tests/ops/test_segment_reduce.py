"""segment_sum and segment_mean: value, gradient, empty segments, NaN, boundary, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import implementations

from sepo.ops import segment_mean, segment_sum
from sepo_kernels.segment_reduce import IMPLS, reference

impl = implementations.fixture(IMPLS)
forward, backward = torch.ops.sepo.segment_sum_fwd, torch.ops.sepo.segment_sum_bwd


def offsets(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), max_size=8), wide=st.booleans())
def test_equals_the_definition(lengths, wide):
    values, cu = torch.randn(sum(lengths), dtype=torch.float64), offsets(lengths)
    expected = reference.segment_sum(values, cu)
    cu = cu.long() if wide else cu
    torch.testing.assert_close(segment_sum(values, cu), expected, rtol=1e-13, atol=1e-13)
    mean = expected / torch.tensor(lengths or [1]).clamp(min=1)[: len(lengths)]
    torch.testing.assert_close(segment_mean(values, cu), mean, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lengths", [[], [0], [0, 1, 15, 16, 17, 0, 33, 1000], [70_001, 3]])
def test_every_implementation_sums_and_spreads(impl, lengths, dtype, wide):
    values, grad_sum = torch.randn(sum(lengths), dtype=dtype), torch.randn(len(lengths))
    cu = offsets(lengths)
    # summed in float64: a float32 sum is off by its own rounding alone
    tolerance = dict(rtol=1e-12, atol=1e-12) if dtype == torch.float64 else dict(rtol=6e-8, atol=0)
    expected = reference.segment_sum(values.double(), cu)
    got = forward(values, cu.long() if wide else cu, impl)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, **tolerance)
    grad = backward(grad_sum.to(dtype), cu.long() if wide else cu, sum(lengths), impl)
    want = grad_sum.to(dtype).repeat_interleave(torch.tensor(lengths, dtype=torch.long))
    assert grad.dtype == dtype and torch.equal(grad, want)


@pytest.mark.native
def test_the_native_implementation_is_the_one_used(monkeypatch):
    used = []
    run = lambda values, cu_rows, impl: used.append(impl) or forward(values, cu_rows, impl)
    monkeypatch.setattr("sepo.ops._segment_reduce._fwd", run)
    segment_sum(torch.zeros(2), offsets([2]))
    assert used == ["native"]


@pytest.mark.parametrize("fn", [segment_sum, segment_mean])
@pytest.mark.parametrize("lengths", [[3, 1, 0, 4], [0, 0], [], [2]])
def test_gradcheck(fn, lengths):
    values = torch.randn(sum(lengths), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: fn(v, offsets(lengths)), (values,))


@pytest.mark.parametrize("fn", [segment_sum, segment_mean])
def test_an_empty_segment_is_zero_and_passes_no_gradient(fn):
    values = torch.tensor([-1.0, -3.0], requires_grad=True)
    out = fn(values, offsets([0, 2, 0]))
    assert out.tolist() == [0.0, -4.0 if fn is segment_sum else -2.0, 0.0]
    # an infinite gradient of the empty ones would show as NaN or inf
    out.backward(torch.tensor([float("inf"), 1.0, float("nan")]))
    assert values.grad.tolist() == ([1.0, 1.0] if fn is segment_sum else [0.5, 0.5])


def test_no_values_is_a_differentiable_zero():
    values = torch.zeros(0, requires_grad=True)
    out = segment_mean(values, offsets([0, 0]))
    out.sum().backward()
    assert out.tolist() == [0.0, 0.0] and values.grad.shape == (0,)


def test_nan_stays_in_its_segment(impl):
    values, cu = torch.tensor([1.0, float("nan"), 2.0, 3.0]), offsets([1, 1, 2])
    out = forward(values, cu, impl)
    assert out[0] == 1 and out[1].isnan() and out[2] == 5
    grad = backward(torch.tensor([1.0, float("nan"), 2.0]), cu, 4, impl)
    assert grad[[0, 2, 3]].tolist() == [1.0, 2.0, 2.0]


def test_a_small_segment_after_a_large_one_keeps_its_precision(impl):
    values = torch.tensor([1e9] * 1000 + [1e-3, 2e-3])
    assert forward(values, offsets([1000, 2]), impl)[1].item() == pytest.approx(3e-3, rel=1e-6)


def test_repeatable_bit_for_bit_with_any_number_of_threads(impl):
    values, cu = torch.randn(250_000), offsets([50_000] * 5)
    one = forward(values, cu, impl)
    torch.set_num_threads(3)
    try:
        three = forward(values, cu, impl)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one, three) and torch.equal(one, forward(values, cu, impl))


def test_operator_registration(impl):
    values, cu = torch.randn(7), offsets([3, 0, 4])
    torch.library.opcheck(torch.ops.sepo.segment_sum_fwd.default, (values, cu, impl))
    grad = torch.randn(3)
    torch.library.opcheck(torch.ops.sepo.segment_sum_bwd.default, (grad, cu, 7, impl))


# Dynamo makes an instance of every autograd Function it traces, and torch warns of it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")
@pytest.mark.parametrize("fn", [segment_sum, segment_mean])
def test_compiles_as_one_node(fn):
    cu, results = offsets([3, 0, 4]), []
    for op in (fn, torch.compile(fn, fullgraph=True, backend="aot_eager")):
        values = torch.linspace(-1, 1, 7).requires_grad_()
        out = op(values, cu)
        results.append((out, *torch.autograd.grad(out.square().sum(), values)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


REFUSALS = {
    "rank": (dict(values=torch.zeros(2, 2)), r"values \(M,\).*got \(2, 2\) and \(2,\)"),
    "no offsets": (dict(cu_rows=torch.zeros(0, dtype=torch.int32)), r"got \(4,\) and \(0,\)"),
    "dtype": (dict(values=torch.zeros(4).bfloat16()), "float64 values, got torch.bfloat16"),
    "offsets": (dict(cu_rows=torch.zeros(2)), "int32 or int64 cu_rows, got torch.float32"),
    "device": (dict(values=torch.zeros(4, device="meta")), "one device, got meta and cpu"),
    "end": (dict(cu_rows=offsets([3])), "cu_rows from 0 to 4, got from 0 to 3"),
    "falls": (dict(cu_rows=torch.tensor([0, 3, 2, 4])), "cu_rows that never falls, got 3, 2 at 1"),
}


@pytest.mark.parametrize("fn", [segment_sum, segment_mean])
@pytest.mark.parametrize("case", REFUSALS)
def test_refuses_by_name(case, fn):
    wrong, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        fn(**dict(values=torch.zeros(4), cu_rows=offsets([4])) | wrong)


@pytest.mark.native
def test_the_native_operators_read_nothing_outside_their_tensors():
    values, native = torch.zeros(4), torch.ops.sepo
    for cu in (offsets([5]), torch.tensor([0, 3, 2, 4]).int()):
        with pytest.raises(ValueError, match="expected cu_rows that rises from 0 to 4"):
            native.native_segment_sum(values, cu)
        with pytest.raises(ValueError, match="expected cu_rows that rises from 0 to 4"):
            native.native_segment_sum_bwd(torch.zeros(cu.shape[0] - 1), cu, 4)
    with pytest.raises(ValueError, match=r"expected contiguous grad_sum \(1,\), got \[2\]"):
        native.native_segment_sum_bwd(torch.zeros(2), offsets([4]), 4)
