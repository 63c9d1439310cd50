"""The heads on a GPU that is not there: schedule, products, bytes and modelled time of an H200.

The times are modelled (see traced.py), not measured. In brackets what they were with a budget of
1 GiB, sums outside the products, and two passes over the logits.
"""

from dataclasses import replace

import pytest
import torch

import sepo.ops as ops
from bench.operations import head, kl, stats
from sepo_kernels.selected_logprob_kl.layout import DIRECTIONS

pytest.importorskip("triton")

from ops.traced import BANDWIDTH, H200, RATE, trace  # noqa: E402

CASES = {case.name: case for module in (head, kl, stats) for case in module.cases("cuda")}
KL = CASES["kl-large-50-ref-policy"]
# case: schedule, products of 2 M D V FLOP, modelled milliseconds at most
LARGE = {
    "all rows": (CASES["head-large-100"], "save", 3, 37.0),  # (58.3)
    "30 %": (CASES["head-large-30"], "save", 3, 10.7),  # (10.7)
    "30 %, frozen": (CASES["head-large-frozen-30"], "frozen_head", 2, 7.5),
    "two heads, 50 %": (KL, "save", 4, 27.0),  # (48.7)
    "two heads, 6144 rows": (replace(KL, name="", M=6144), "save", 4, 40.0),  # (72.3)
}


def call_of(case, told: list, **options):
    """Forward and backward of a benchmark's case, on tensors that `trace` makes fake.

    The two operators in turn: a torch without CUDA has no autograd of CUDA tensors, fake or not.
    """

    def call():
        new = lambda *shape, dtype=case.dtype: torch.empty(shape, dtype=dtype, device="cuda")
        hidden, weight = new(case.N, case.D), new(case.V, case.D)
        rows, targets = new(case.M, dtype=torch.int32), new(case.M, dtype=torch.int64)
        up, leaves = new(case.M, dtype=torch.float32), getattr(case, "leaves", "both")
        need = leaves != "none", leaves == "both", False
        learnt = [x.detach().requires_grad_(n) for x, n in zip((hidden, weight), need)]  # noqa: B905
        kind, operators = dict(impl="triton", **options), torch.ops.sepo
        if isinstance(case, stats.StatsCase):
            kind["entropy_grad"] = case.entropy_grad
            told.append(ops.explain_selected_stats(*learnt, rows, targets, **kind))
            settings = told[-1].schedule, told[-1].budget
            args = hidden, weight, None, rows, targets
            logp, lse, row_scale, entropy, *_, reference, _, saved = operators.selected_stats_fwd(
                *args, 1.0, None, case.entropy_grad, *settings, "triton"
            )
            last = saved, 1.0, None, *settings, *need, "triton"
            if case.entropy_grad:
                found = logp, lse, entropy, reference, row_scale
                operators.selected_stats_bwd(up, up, *args, *found, *last)
            else:
                operators.selected_logprob_bwd(up, *args, logp, lse, row_scale, *last)
            return
        if isinstance(case, head.HeadCase):
            told.append(ops.explain_selected_logprob(*learnt, rows, targets, **kind))
            settings = 1.0, None, told[-1].schedule, told[-1].budget
            args = hidden, weight, None, rows, targets
            found = operators.selected_logprob_fwd(*args, *settings, "triton")
            operators.selected_logprob_bwd(up, *args, *found, *settings, *need, "triton")
            return
        ref = new(case.N, case.D), new(case.V, case.D)
        kind["direction"] = case.direction
        told.append(ops.explain_selected_logprob_kl(*learnt, *ref, rows, targets, **kind))
        beta = DIRECTIONS[case.direction]
        settings = 1.0, None, 1.0, None, beta, told[-1].schedule, told[-1].budget
        args = hidden, weight, None, *ref, None, rows, targets
        found = operators.selected_logprob_kl_fwd(*args, *settings, "triton")
        operators.selected_logprob_kl_bwd(up, up, *args, *found, *settings, *need, "triton")

    return call


def large(name, **options):
    told = []
    return trace(call_of(LARGE[name][0], told, **options)), told[0]


@pytest.mark.parametrize("name", LARGE)
def test_schedule_products_and_modelled_time(name):
    case, schedule, products, most = LARGE[name]
    found, told = large(name)
    assert (told.impl, told.schedule, told.gemms) == ("triton", schedule, products)
    assert told.saved == (case.M if schedule == "save" else 0)
    assert told.peak_bytes <= told.budget <= H200[1] // 8
    flop = sum(k.flop for k in found.products)
    assert flop == products * 2 * case.M * case.D * case.V
    bound = 1e3 * flop / RATE
    assert bound < found.ms <= most, (found.ms, found.gigabytes())


@pytest.mark.parametrize("budget", [None, 2 << 30, 1 << 30], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_sums_and_casts_take_no_more_than_5_percent_of_the_products_time(name, budget):
    found, _ = large(name, budget=budget)
    seconds = sum(k.bytes for k in found.others) / BANDWIDTH
    assert 0 < seconds <= 0.05 * sum(k.seconds for k in found.products), found.gigabytes()


@pytest.mark.parametrize("name", ["all rows", "two heads, 50 %", "two heads, 6144 rows"])
def test_with_less_memory_as_many_rows_as_fit_are_saved(name):
    case, _, whole, _ = LARGE[name]
    heads = 1 if whole == 3 else 2
    before = float("inf")
    for budget in (1 << 30, 3 << 29, 2 << 30):
        found, told = large(name, budget=budget)
        assert told.schedule == "partial" and 0 < told.saved < case.M
        assert told.peak_bytes <= budget
        flop = sum(k.flop for k in found.products)
        assert flop == 2 * case.D * case.V * (whole * case.M + heads * (case.M - told.saved))
        assert told.gemms == pytest.approx(whole + heads * (1 - told.saved / case.M), abs=1e-3)
        assert found.ms < before
        before = found.ms


def test_weight_gradients_are_summed_within_the_products():
    """No tensor of the weight's shape is touched but by products, and by one cast at the end."""
    case = LARGE["all rows"][0]
    found, told = large("all rows", budget=1 << 30)
    size = case.V * case.D
    wide = [k for k in found.others if k.bytes >= 4 * size]
    assert [k.name for k in wide] == ["to"]
    chunks = -(-(case.M - told.saved) // told.bwd_chunk)
    assert sum(k.name == "addmm" for k in found.products) == chunks


def test_statistics_cost_no_gemm_and_no_pass():
    """As a metric they are numbers of the pass that is there; a gradient saves float32 logits."""
    case, told = CASES["head-large-30"], []
    alone, metric, entropy = (
        trace(call_of(CASES[name], told))
        for name in (case.name, "stats-large-30", "stats-entropy-large-30")
    )
    assert [(x.schedule, x.gemms) for x in told] == [("save", 3)] * 3
    M, V = case.M, case.V
    assert [k.flop for k in metric.products] == [k.flop for k in alone.products]
    more = sum(k.bytes for k in metric.rows) - sum(k.bytes for k in alone.rows)
    assert 0 < more <= 6 * 4 * M
    assert metric.ms <= 1.01 * alone.ms and entropy.ms <= 1.1 * alone.ms
    # the logits are read in either direction, dZ is written
    moved = sum(k.bytes for k in entropy.rows)
    assert moved == pytest.approx((4 + 4 + 2) * M * V, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_too(dtype):
    for name in ("all rows", "two heads, 50 %"):
        case, told = replace(LARGE[name][0], dtype=dtype), []
        found = trace(call_of(case, told, budget=1 << 30))
        assert told[0].schedule == "partial"
        assert any(k.name.startswith("addmm") for k in found.products)
        assert not any(k.name in ("add_", "add") and k.bytes > 1e9 for k in found.others)


@pytest.mark.parametrize("V", [32001, 50257, 151669])
def test_any_vocabulary(V):
    """Rows that begin at cache lines are products' operands as they are: nothing is copied."""
    for name in ("30 %", "two heads, 50 %"):
        case, told = replace(LARGE[name][0], V=V), []
        found = trace(call_of(case, told))
        assert told[0].schedule == "save"
        assert (
            max(k.bytes for k in found.others) < 4 * case.M * V
        )  # a copy of dlogits moves as much
