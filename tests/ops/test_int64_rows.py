"""int64 rows, as torch.arange and nonzero make them, are int32 rows: values, gradients, refusals."""

import pytest
import torch
from ops import kl_cases, logprob_cases
from ops.implementations import parameters

from sepo import ops
from sepo.ops._checks import as_int32
from sepo_kernels.selected_logprob import IMPLS
from sepo_kernels.selected_logprob_kl import IMPLS as TWO_HEADS

BIG = 2**32 + 1  # 1, if its upper half were lost


def one_head(schedule, impl, convert, fn=ops.selected_logprob):
    *head, rows, targets, up = logprob_cases.make_inputs(37, 23, 45, 101, bias=True)
    budget = logprob_cases.budget_for(schedule, 101, impl=impl)
    inputs = (*head, convert(rows), targets, up)
    options = dict(dtype=torch.float32, schedule=schedule, budget=budget, impl=impl)
    return logprob_cases.run(fn, inputs, **options)


def two_heads(schedule, impl, convert, fn=ops.selected_logprob_kl):
    i = kl_cases.make_inputs(37, 23, 45, 29, 101, bias=True)
    i = i._replace(rows=convert(i.rows))
    options = dict(schedule=schedule, budget=kl_cases.budget_for(schedule, 101), impl=impl)
    return kl_cases.run(fn, i, **options)


BOTH = pytest.mark.parametrize("operation", [one_head, two_heads])
SCHEDULES = pytest.mark.parametrize("schedule", logprob_cases.SCHEDULES)
EVERY_IMPL = pytest.mark.parametrize("impl", parameters(IMPLS))


def test_both_operations_have_the_same_implementations():
    assert [i.name for i in IMPLS] == [i.name for i in TWO_HEADS]


@BOTH
@SCHEDULES
@EVERY_IMPL
def test_same_bits(operation, schedule, impl):
    narrow, wide = (operation(schedule, impl, c) for c in (torch.Tensor.int, torch.Tensor.long))
    assert narrow.keys() == wide.keys()
    assert all(torch.equal(wide[name], narrow[name]) for name in narrow)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")
@BOTH
@SCHEDULES
def test_same_bits_compiled(operation, schedule):
    public = ops.selected_logprob if operation is one_head else ops.selected_logprob_kl
    torch._dynamo.reset()
    compiled = torch.compile(public, fullgraph=True, backend="aot_eager")
    eager = operation(schedule, "chunked", torch.Tensor.int)
    traced = operation(schedule, "chunked", torch.Tensor.long, fn=compiled)
    assert all(torch.equal(traced[name], eager[name]) for name in eager)


@EVERY_IMPL
def test_operators_take_both(impl):
    hidden, weight, bias, rows, targets, up = logprob_cases.make_inputs(8, 5, 16, 31, bias=True)
    head = (hidden, weight, bias, rows.long(), targets)
    settings = (0.5, 4.0, "recompute", 2 * 31 * 10)
    fwd, bwd = torch.ops.sepo.selected_logprob_fwd, torch.ops.sepo.selected_logprob_bwd
    torch.library.opcheck(fwd.default, (*head, *settings, impl))
    found = fwd(*head, *settings, impl)
    torch.library.opcheck(bwd.default, (up, *head, *found, *settings, True, True, True, impl))

    i = kl_cases.make_inputs(8, 5, 16, 12, 31, bias=True)
    heads = (*i[:6], i.rows.long(), i.targets)
    settings = (0.5, 4.0, "policy||ref", "recompute", 2 * 31 * 14)
    fwd, bwd = torch.ops.sepo.selected_logprob_kl_fwd, torch.ops.sepo.selected_logprob_kl_bwd
    torch.library.opcheck(fwd.default, (*heads, *settings, impl))
    found = fwd(*heads, *settings, impl)
    needs = (True, True, True)
    torch.library.opcheck(bwd.default, (*i.upstream, *heads, *found, *settings, *needs, impl))


def test_explanations_and_labels_take_both():
    hidden, weight, _, rows, targets, _ = logprob_cases.make_inputs(37, 23, 45, 101)
    explain = lambda rows: ops.explain_selected_logprob(hidden, weight, rows, targets)
    assert explain(rows.long()) == explain(rows)
    i = kl_cases.make_inputs(37, 23, 45, 29, 101)
    explain = lambda rows: i._replace(rows=rows).call(ops.explain_selected_logprob_kl)
    assert explain(i.rows.long()) == explain(i.rows)
    rows, targets = torch.tensor([0, 2, 5]), torch.tensor([7, 8, 9])
    labels = [ops.labels_from_rows(r, targets, shape=(2, 4)) for r in (rows, rows.int())]
    assert torch.equal(*labels)


@pytest.mark.parametrize("value", [BIG, -BIG, 2**31, 8])
def test_a_row_beyond_the_range_is_refused(value):
    i = kl_cases.make_inputs(8, 3, 16, 12, 31)
    rows = torch.tensor([0, value, 7])
    message = f"expected 0 <= rows < 8, got {value}$"
    calls = [
        lambda: ops.selected_logprob(i.hidden, i.weight, rows, i.targets),
        lambda: i._replace(rows=rows).call(ops.selected_logprob_kl),
        lambda: ops.labels_from_rows(rows, i.targets, shape=(2, 4)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_nobody_wraps_around_where_nobody_looks():
    """On a GPU values are not read: one that is out of range may not become one that is not."""
    rows = torch.tensor([BIG, -BIG, 2**31, 5])
    assert rows.int().tolist() == [1, -1, -(2**31), 5]  # what a plain cast makes of them
    assert as_int32(rows).tolist() == [2**31 - 1, -(2**31), 2**31 - 1, 5]
    narrow = rows[3:].int()
    assert as_int32(narrow) is narrow


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_offsets_of_both_widths(dtype):
    values = torch.arange(6.0, requires_grad=True)
    cu_rows = torch.tensor([0, 2, 6], dtype=dtype)
    assert ops.segment_sum(values, cu_rows).tolist() == [1.0, 14.0]
    assert ops.segment_mean(values, cu_rows).tolist() == [0.5, 3.5]
    index, kept = ops.segment_topk(values, cu_rows, 0.5, "highest")
    assert index.tolist() == [1, 4, 5] and kept.tolist() == [0, 1, 3]
    with pytest.raises(ValueError, match=f"expected cu_rows from 0 to 6, got from 0 to {BIG}"):
        ops.segment_sum(values, torch.tensor([0, BIG]))
