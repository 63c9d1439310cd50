"""A scale for each row, as a temperature of each sample: both heads, every implementation."""

import pytest
import torch
from numerics import assert_as_accurate
from ops import implementations, kl_cases, logprob_cases
from ops.scale_cases import M, One, Two, V, spread

from sepo.ops import explain_selected_logprob, selected_logprob, selected_logprob_kl
from sepo_kernels.selected_logprob import IMPLS
from sepo_kernels.selected_logprob import reference as one_head

impl = implementations.fixture(IMPLS)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


CASES = [(head, schedule) for head in (One, Two) for schedule in head.schedules]
each_case = pytest.mark.parametrize(("head", "schedule"), CASES, ids=lambda x: getattr(x, "__name__", x))  # fmt: skip


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_case
def test_equal_scales_give_the_bits_of_one(impl, head, schedule, dtype, softcap):
    inputs, budget = head.inputs(dtype), head.budget(schedule, dtype, impl)
    options = dict(softcap=softcap, budget=budget, impl=impl)
    for scale in (1.0, 0.7):
        each = torch.full((M,), scale, dtype=torch.promote_types(dtype, torch.float32))
        one = head.run(head.fn, inputs, schedule, dtype, scale=scale, **options)
        found = head.run(head.fn, inputs, schedule, dtype, scale=each, **options)
        for name, value in one.items():
            assert torch.equal(found[name], value), (scale, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_case
def test_as_accurate_as_plain_pytorch(impl, head, schedule, dtype):
    inputs, scale = head.inputs(dtype, 40), spread(dtype)[:40]
    options = dict(softcap=3.0, budget=head.budget(schedule, dtype, impl), impl=impl)
    ours = head.run(head.fn, inputs, schedule, dtype, scale=scale, **options)
    exact = dict(scale=scale.double(), softcap=3.0)
    truth = head.run(head.reference, inputs, schedule, torch.float64, **exact)
    plain = head.run(head.reference, inputs, schedule, dtype, scale=scale, softcap=3.0)
    assert ours.keys() == truth.keys()
    for name, value in truth.items():
        if dtype == torch.float64:
            torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-13, msg=name)
        else:
            assert_as_accurate(ours[name], plain[name], value, what=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", ["save", "recompute"])
@pytest.mark.parametrize("head", [One, Two])
def test_each_row_is_as_alone(impl, head, schedule, dtype):
    """Rows with one temperature between rows with others, and those rows with a number."""
    some = torch.arange(3, M, 5)
    inputs, scale = head.inputs(dtype), spread(dtype)
    scale[some] = 0.6
    options = dict(budget=head.budget(schedule, dtype, impl), impl=impl)
    whole = head.run(head.fn, inputs, schedule, dtype, scale=scale, **options)
    *tensors, rows, targets, up = inputs
    few = (*tensors, rows[some], targets[some], up[..., some])
    few = few if head is One else kl_cases.Inputs(*few)
    alone = head.run(head.fn, few, "no_grad", dtype, scale=0.6, impl=impl)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for name, value in alone.items():
        torch.testing.assert_close(whole[name][some], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("budget", [None, 2 * 3 * 8 * 11], ids=["save", "recompute"])
def test_gradcheck(impl, budget):
    hidden, weight, bias, rows, targets, _ = logprob_cases.make_inputs(
        5, 7, 3, 11, dtype=torch.float64, bias=True
    )
    for x in (hidden, weight, bias):
        x.requires_grad_()
    options = dict(scale=torch.linspace(0.5, 2, 7).double(), budget=budget, impl=impl)
    op = lambda h, w, b: selected_logprob(h, w, rows, targets, bias=b, **options)
    assert torch.autograd.gradcheck(op, (hidden, weight, bias))
    frozen = lambda h: selected_logprob(
        h, weight.detach(), rows, targets, bias=bias.detach(), **options
    )
    assert torch.autograd.gradcheck(frozen, (hidden,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [50.0, 90.0])
def test_hopeless_targets_are_redone_with_their_own_scale(impl, size, dtype):
    """Each second row is: e^50 is beyond the kernels' 2^60."""
    hidden = torch.tensor([[size], [0.01]], dtype=dtype)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], dtype=dtype)
    rows, targets = torch.arange(2).repeat(3).int(), torch.tensor([1, 1, 0, 2, 2, 0])
    scale = torch.tensor([1.5, 0.5, 2.0, 1.0, 0.9, 0.7])
    ours = selected_logprob(hidden, weight, rows, targets, scale=scale, impl=impl)
    exact = one_head.selected_logprob(
        hidden.double(), weight.double(), rows, targets, scale=scale.double()
    )
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)


def test_no_rows(impl):
    for head, fn in ((One, selected_logprob), (Two, selected_logprob_kl)):
        inputs = head.inputs(torch.float32)
        *tensors, rows, targets, up = inputs
        none = (*tensors, rows[:0], targets[:0], up[..., :0])
        none = none if head is One else kl_cases.Inputs(*none)
        found = head.run(fn, none, "save", torch.float32, scale=torch.ones(0), impl=impl)
        assert all(not x.any() for x in found.values())


REFUSALS = {
    "length": (torch.ones(M - 1), rf"a number, or \({M},\) torch.float32, got \({M - 1},\)"),
    "rank": (torch.ones(M, 1), rf"got \({M}, 1\) torch.float32"),
    "dtype": (torch.ones(M).double(), rf"got \({M},\) torch.float64"),
    "half": (torch.ones(M).bfloat16(), rf"got \({M},\) torch.bfloat16"),
    "device": (torch.ones(M, device="meta"), "one device, got meta and cpu"),
    "gradient": (torch.ones(M).requires_grad_(), "scale without a gradient, got one that"),
    "zero": (torch.ones(M).index_fill_(0, torch.tensor(5), 0.0), "scale > 0 in every row, got 0.0"),
    "negative": (-torch.ones(M), "scale > 0 in every row, got -1.0"),
    "not a number": (torch.full((M,), torch.nan), "scale > 0 in every row, got nan"),
}


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("head", [One, Two])
def test_refuses_by_name(head, case):
    scale, message = REFUSALS[case]
    inputs = head.inputs(torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        head.run(head.fn, inputs, "save", torch.bfloat16, scale=scale)


def test_explanation_takes_it_and_reads_no_value():
    hidden, weight, bias, rows, targets, _ = One.inputs(torch.float32)
    explain = lambda scale: explain_selected_logprob(hidden, weight, rows, targets, scale=scale)
    assert explain(-torch.ones(M)) == explain(1.0)
    with pytest.raises(ValueError, match="a number, or"):
        explain(torch.ones(1))


def test_a_learnt_temperature_without_a_gradient_is_taken():
    hidden, weight, bias, rows, targets, _ = One.inputs(torch.float32)
    scale = spread(torch.float32).requires_grad_()
    with torch.no_grad():
        found = selected_logprob(hidden, weight, rows, targets, scale=scale)
    assert torch.equal(found, selected_logprob(hidden, weight, rows, targets, scale=scale.detach()))


@pytest.mark.parametrize("schedule", One.schedules)
def test_operator_registration(impl, schedule):
    inputs = One.inputs(torch.float32)
    scales = spread(torch.float32)
    head, settings = inputs[:5], (1.0, 4.0, schedule, 20 * V * 10)
    fwd, bwd = torch.ops.sepo.selected_logprob_fwd, torch.ops.sepo.selected_logprob_bwd
    torch.library.opcheck(fwd, (*head, *settings, impl), dict(scales=scales))
    if schedule == "no_grad":
        return
    found = fwd(*head, *settings, impl, scales=scales)
    need = (True, schedule != "frozen_head", schedule != "frozen_head")
    args = (inputs[-1], *head, *found, *settings, *need, impl)
    torch.library.opcheck(bwd, args, dict(scales=scales))


# Dynamo makes an instance of every autograd Function it traces, and torch warns of it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")
@pytest.mark.parametrize("head", [One, Two])
def test_compiles_as_one_node(impl, head):
    inputs, scale = head.inputs(torch.float32), spread(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(head.fn, fullgraph=True, backend="aot_eager")
    eager, found = (
        head.run(fn, inputs, "save", torch.float32, scale=scale, impl=impl)
        for fn in (head.fn, compiled)
    )
    assert all(torch.equal(found[name], eager[name]) for name in eager)
