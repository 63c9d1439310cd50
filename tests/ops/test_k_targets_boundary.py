"""The operator boundary of K targets: registration, compilation, explanations, FLOP, refusals."""

import pytest
import torch
from ops import implementations
from ops.k_target_cases import OVER, dense, make_inputs, ours, run
from ops.logprob_cases import SCHEDULES
from torch.utils.flop_counter import FlopCounterMode

from sepo.ops import explain_selected_logprob, selected_logprob
from sepo_kernels.target_logits import IMPLS

FWD = torch.ops.sepo.target_logits_fwd.default
BWD = torch.ops.sepo.target_logits_bwd.default
SHAPE = (8, 5, 16, 31, 4)  # N, M, D, V, K
impl = implementations.fixture(IMPLS)
# Dynamo makes an instance of every autograd Function it traces, and torch warns of it
DYNAMO_WARNS = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated.*:DeprecationWarning"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wide", [False, True])
def test_operator_registration(impl, dtype, wide):
    hidden, weight, bias, rows, targets, up = make_inputs(*SHAPE, bias=True, dtype=dtype)
    rows = rows.long() if wide else rows
    settings, scales = (0.5, 4.0, 1 << 20), dict(scales=torch.full((5,), 0.5) if wide else None)
    torch.library.opcheck(FWD, (hidden, weight, bias, rows, targets, *settings, impl), scales)
    z = FWD(hidden, weight, bias, rows, targets, *settings, impl, **scales)
    for need in [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]:
        totals = [x.clone() if n else None for x, n in zip((hidden, weight, bias), need)]  # noqa: B905
        args = (up, hidden, weight, rows, targets, z, *settings, *totals, impl)
        torch.library.opcheck(BWD, args, scales)


@pytest.mark.parametrize("over", OVER)
def test_a_scale_a_row(impl, over):
    """(M,) of equal entries is the number, to the bit; each row has its own."""
    inputs = make_inputs(*SHAPE, bias=True)
    options = dict(impl=impl, over=over, softcap=4.0, dtype=torch.float32)
    one, same = (ours(inputs, scale=x, **options) for x in (0.5, torch.full((5,), 0.5)))
    assert all(torch.equal(one[name], same[name]) for name in one)
    scale = torch.linspace(0.5, 2.0, 5)
    found = ours(inputs, scale=scale, **options)
    alone = [ours(inputs, scale=x, **options)["logp"][m] for m, x in enumerate(scale.tolist())]
    assert torch.equal(found["logp"], torch.stack(alone))
    truth = run(
        dense, inputs, dtype=torch.float64, over=over, softcap=4.0, scale=scale.double()[:, None]
    )
    for name, value in truth.items():
        torch.testing.assert_close(found[name].double(), value, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ([1.0, 0.5, 0.0, 1.0, 1.0], "expected scale > 0 in every row, got 0.0"),
        ([1.0, 0.5, float("nan"), 1.0, 1.0], "expected scale > 0 in every row, got nan"),
        ([1.0, 0.5], r"expected scale a number, or \(5,\) torch.float32, got \(2,\) torch.float32"),
    ],
)
def test_a_scale_that_is_none(impl, over, scale, message):
    hidden, weight, bias, rows, targets, _ = make_inputs(*SHAPE, bias=True)
    options = dict(bias=bias, scale=torch.tensor(scale), over=over, impl=impl)
    with pytest.raises(ValueError, match=message):
        selected_logprob(hidden, weight, rows, targets, **options)


@DYNAMO_WARNS
@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_compiles_as_one_graph(impl, schedule, over):
    inputs = make_inputs(37, 23, 45, 101, 4, bias=True)
    options = dict(
        budget=None if schedule == "save" else 1 << 13, impl=impl, softcap=3.0, over=over
    )
    torch._dynamo.reset()
    compiled = torch.compile(selected_logprob, fullgraph=True, backend="aot_eager")
    found, eager = (
        run(fn, inputs, dtype=torch.float32, schedule=schedule, **options)
        for fn in (compiled, selected_logprob)
    )
    assert found.keys() == eager.keys()
    assert all(torch.equal(found[name], eager[name]) for name in eager)


@DYNAMO_WARNS
@pytest.mark.parametrize("over", OVER)
def test_compiles_once_for_any_number_of_rows(impl, over):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(selected_logprob, fullgraph=True, backend=backend, dynamic=True)
    for N, M in ((37, 23), (41, 30), (20, 64)):
        hidden, weight, _, rows, targets, _ = make_inputs(N, M, 16, 31, 4)
        with torch.no_grad():
            logp = compiled(hidden, weight, rows, targets, impl=impl, over=over)
            eager = selected_logprob(hidden, weight, rows, targets, impl=impl, over=over)
            assert torch.equal(logp, eager)
    assert len(graphs) == 1


@pytest.mark.parametrize("over", OVER)
def test_runs_on_fake_tensors(over):
    with torch._subclasses.FakeTensorMode():
        hidden = torch.empty(8, 16, requires_grad=True)
        weight = torch.empty(31, 16, requires_grad=True)
        rows, targets = torch.empty(5, dtype=torch.int32), torch.empty(5, 3, dtype=torch.int64)
        logp = selected_logprob(hidden, weight, rows, targets, over=over)
        logp.sum().backward()
        assert logp.shape == (5, 3) and hidden.grad.shape == (8, 16)
        assert weight.grad.shape == (31, 16)


@pytest.mark.parametrize("need", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_flop_as_explained(impl, need):
    """One target's GEMMs, and 2 M K D for the logits and for each gradient."""
    N, M, D, V, K = 12, 6, 16, 301, 5
    hidden, weight, _, rows, targets, up = make_inputs(N, M, D, V, K)
    hidden.requires_grad_(bool(need[0])), weight.requires_grad_(bool(need[1]))
    for over in OVER:
        args = dict(over=over, impl=impl)
        told = explain_selected_logprob(hidden, weight, rows, targets, **args)
        with FlopCounterMode(display=False) as formula:
            logp = selected_logprob(hidden, weight, rows, targets, **args)
            if sum(need):
                logp.backward(up)
        expected = told.gemms * 2 * M * D * V + (1 + sum(need)) * 2 * M * K * D
        assert formula.get_total_flops() == expected
        assert (told.gemms == 0) == (over == "targets")


def test_explanations_name_what_is_read():
    hidden, weight, _, rows, targets, _ = make_inputs(*SHAPE)
    weight.requires_grad_()
    explain = lambda *args, **k: explain_selected_logprob(hidden, weight, *args, **k)
    one = explain(rows, targets[:, 0], impl="chunked")
    found = explain(rows, targets, impl="chunked")
    assert found[:4] == one[:4] and found[5:8] == one[5:8] and found.reasons[:-1] == one.reasons
    gathered = 5 * 4 * 16 * 4  # bytes
    assert found.peak_bytes == max(one.peak_bytes, gathered)
    assert found.reasons[-1] == (
        "4 targets a row: their rows of the head are gathered, 1280 bytes at once, "
        "and no more GEMMs than for one"
    )
    assert explain(rows, targets[:, :1], impl="chunked") == one
    found = explain(rows, targets, over="targets", impl="chunked", budget=2 * 4 * 16 * 4)
    assert found == (
        "chunked", "targets", 2, 2, 512, 0, 0, 512,
        ("over 4 targets a row: their rows of the head are gathered, 512 bytes at once, and no GEMM",
         "budget 512 bytes, as given"),
    )  # fmt: skip
    with torch.no_grad():
        assert explain(rows, targets, over="targets").bwd_chunk == 0
    # one row of the head at a time, where the budget holds no more
    assert explain(rows, targets, over="targets", impl="chunked", budget=64).peak_bytes == 64


REFUSALS = {
    "rows shape": (dict(rows=torch.zeros(3, dtype=torch.int32)), r"got \(3,\) and \(2, 3\)"),
    "rank": (
        dict(targets=torch.zeros(2, 3, 1).long()),
        r"rows \(M,\) and targets \(M,\), got \(2,\) and \(2, 3, 1\)",
    ),
    "no column": (dict(targets=torch.zeros(2, 0).long()), r"K > 0, got \(2,\) and \(2, 0\)"),
    "one column over itself": (
        dict(targets=torch.zeros(2).long(), over="targets"),
        r"targets \(M, K\) with K > 0, got \(2,\) and \(2,\)",
    ),
    "over": (dict(over="rows"), 'over to be "vocabulary" or "targets", got "rows"'),
    "rows dtype": (dict(rows=torch.zeros(2)), "int32 or int64 rows.*got torch.float32"),
    "targets dtype": (
        dict(targets=torch.zeros(2, 3, dtype=torch.int32)),
        "int64 targets, got torch.int32 and torch.int32",
    ),
    "width": (dict(weight=torch.zeros(16, 9)), r"got \(4, 8\) and \(16, 9\)"),
    "device": (dict(weight=torch.zeros(16, 8, device="meta")), "one device, got meta and cpu"),
    "softcap": (dict(softcap=0.0), "softcap > 0 or None, got 0.0"),
    "budget": (
        dict(budget=31, impl="chunked", over="targets"),
        "at least one row of the head, 32 bytes, got 31",
    ),
    "logits' budget": (dict(budget=63), "at least one row, 64 bytes, got 63"),
    "impl": (dict(impl="fast"), 'unknown impl "fast"'),
}


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("fn", [selected_logprob, explain_selected_logprob])
def test_refuses_by_name(case, fn):
    wrong, message = REFUSALS[case]
    hidden, weight, _, rows, targets, _ = make_inputs(4, 2, 8, 16, 3)
    args = dict(hidden=hidden, weight=weight, rows=rows, targets=targets) | wrong
    with pytest.raises(ValueError, match=message):
        fn(**args)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([[0, 1], [16, 2]], "expected -1 <= targets < 16, got 16"),
        ([[0, 1], [3, -2]], "expected -1 <= targets < 16, got -2"),
        ([[0, -1], [-1, -1]], "expected a target in every row, got none but -1 in row 1"),
    ],
)
def test_values_out_of_range_are_named(impl, over, targets, message):
    hidden, weight, _, rows, _, _ = make_inputs(4, 2, 8, 16, 3)
    with pytest.raises(ValueError, match=message):
        selected_logprob(hidden, weight, rows, torch.tensor(targets), over=over, impl=impl)


@pytest.mark.parametrize("over", OVER)
def test_rows_out_of_range_are_named(over):
    hidden, weight, _, rows, targets, _ = make_inputs(4, 2, 8, 16, 3)
    with pytest.raises(ValueError, match="expected 0 <= rows < 4, got 4"):
        selected_logprob(hidden, weight, rows * 0 + 4, targets, over=over)


def test_a_column_without_a_target_is_refused():
    hidden, weight, _, rows, _, _ = make_inputs(4, 2, 8, 16, 3)
    with pytest.raises(ValueError, match="expected 0 <= targets < 16, got -1"):
        selected_logprob(hidden, weight, rows, torch.tensor([[3], [-1]]))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.func imports it
@pytest.mark.parametrize("over", OVER)
def test_a_tangent_is_refused_and_not_lost(over):
    hidden, weight, _, rows, targets, _ = make_inputs(4, 2, 8, 16, 3)
    fn = lambda h: selected_logprob(h, weight, rows, targets, over=over)
    with pytest.raises(NotImplementedError, match="expected reverse mode"):
        torch.func.jvp(fn, (hidden,), (hidden,))
