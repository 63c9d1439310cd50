"""Some rows are saved and the others recomputed, in padded blocks: a GPU's way, done on a CPU."""

import pytest
import torch
from numerics import assert_as_accurate
from ops import kl_cases, logprob_cases
from recorder import Recorder, allocator_peak
from torch.utils.flop_counter import FlopCounterMode

from sepo.ops import (
    explain_selected_logprob,
    explain_selected_logprob_kl,
    selected_logprob,
    selected_logprob_kl,
)
from sepo_kernels import devices, gemm, schedules, waves
from sepo_kernels.selected_logprob import reference as one_head
from sepo_kernels.selected_logprob.layout import HeadLayout
from sepo_kernels.selected_logprob_kl import chunked
from sepo_kernels.selected_logprob_kl import reference as two_heads
from sepo_kernels.selected_logprob_kl.layout import TwoHeadLayout

TILE, MULTIPROCESSORS = 8, 2
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
SAVED = [8, 24, 32]  # rows


@pytest.fixture(autouse=True)
def a_small_gpu(monkeypatch):
    """Of two multiprocessors that take tiles of eight rows; it computes as chunked does on a CPU."""
    monkeypatch.setattr(devices, "multiprocessors", lambda device: MULTIPROCESSORS)
    monkeypatch.setattr(devices, "memory", lambda device: 1 << 40)
    monkeypatch.setattr(waves, "TILE_ROWS", TILE)
    monkeypatch.setattr(waves, "RESIDENT_ROWS", {1: 8, 2: 6})
    monkeypatch.setattr(waves, "ENOUGH_ROWS", 1)
    monkeypatch.setattr(waves, "ADDING_ROWS", 16)
    waves.chunk_rows.cache_clear()
    yield
    waves.chunk_rows.cache_clear()


class OneHead:
    """selected_logprob and what its tests know of it, beside the same of selected_logprob_kl."""

    fn, explain, reference = selected_logprob, explain_selected_logprob, one_head.selected_logprob
    run = staticmethod(logprob_cases.run)

    @staticmethod
    def inputs(N, M, D, V, dtype, bias=True):
        return logprob_cases.make_inputs(N, M, D, V, dtype=dtype, bias=bias)

    @staticmethod
    def layout(V, D, dtype, softcap=None):
        return HeadLayout(V, dtype, softcap is not None, False, MULTIPROCESSORS, D)


class TwoHeads:
    fn, explain = selected_logprob_kl, explain_selected_logprob_kl
    reference = two_heads.selected_logprob_kl

    @staticmethod
    def run(fn, inputs, **options):
        return kl_cases.run(fn, inputs, **options)

    @staticmethod
    def inputs(N, M, D, V, dtype, bias=True):
        return kl_cases.make_inputs(N, M, D, 16, V, dtype=dtype, bias=bias)

    @staticmethod
    def layout(V, D, dtype, softcap=None):
        return TwoHeadLayout(V, dtype, dtype, False, MULTIPROCESSORS, D)


@pytest.fixture(params=[OneHead, TwoHeads], ids=lambda x: x.__name__)
def op(request):
    return request.param


def partly(op, told: list):
    """op.fn, after a note of what it is going to do."""

    def fn(*args, **options):
        told.append(op.explain(*args, **options))
        return op.fn(*args, **options)

    return fn


def budget_of(op, saved, M, V, D, dtype, softcap=None) -> int:
    """The least that keeps so many rows."""
    layout = op.layout(V, D, dtype, softcap)
    if saved == M:
        return schedules.save_bytes(M, layout)
    budgets = range(0, schedules.save_bytes(M, layout), layout.saved_bytes // 8)
    return next(b for b in budgets if schedules.saved_rows(M, layout, b, "partial") == saved)


N, M, D, V = 40, 53, 24, 101


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("options", [{}, dict(scale=0.7, softcap=3.0)], ids=["plain", "all"])
def test_right_and_as_accurate_as_plain_pytorch(op, saved, dtype, options):
    inputs, told = op.inputs(N, M, D, V, dtype), []
    truth = op.run(op.reference, inputs, dtype=torch.float64, **options)
    budget = budget_of(op, saved, M, V, D, dtype, options.get("softcap"))
    kind = dict(dtype=dtype, impl="chunked", **options)
    ours = op.run(partly(op, told), inputs, budget=budget, **kind)
    assert (told[0].schedule, told[0].saved) == ("partial", saved)
    assert told[0].peak_bytes <= budget
    if dtype == torch.float64:
        for name, value in truth.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-11, atol=1e-12, msg=name)
        return
    plain = op.run(op.reference, inputs, dtype=dtype, **options)
    for name, value in truth.items():
        assert_as_accurate(ours[name], plain[name], value, what=name)


def test_more_budget_saves_more_rows_and_products(op):
    inputs, told = op.inputs(N, M, D, V, torch.float32), []
    whole = 3 if op is OneHead else 4
    for saved in SAVED:
        budget = budget_of(op, saved, M, V, D, torch.float32)
        with FlopCounterMode(display=False) as counter:
            op.run(partly(op, told), inputs, budget=budget, impl="chunked", dtype=torch.float32)
        again, ref_d = M - told[-1].saved, 0 if op is OneHead else 16
        products = 3 * M * D + M * ref_d + again * (D + ref_d)
        assert counter.get_total_flops() == 2 * V * products
        heads = 1 if op is OneHead else 2
        assert told[-1].gemms == pytest.approx(whole + heads * again / M, abs=1e-3)
        assert f"of {again} of {M} rows are computed twice" in told[-1].reasons[0]
        assert told[-1].reasons[-1] == f"budget {budget} bytes, as given"
    assert [x.saved for x in told] == SAVED


def test_the_least_budgets_recompute_all_and_the_largest_nothing(op):
    inputs, told = op.inputs(N, M, D, V, torch.float32), []
    row = op.layout(V, D, torch.float32).row_bytes(gradient=True)
    for budget in (row, budget_of(op, M, M, V, D, torch.float32), None):
        op.run(partly(op, told), inputs, budget=budget, impl="chunked", dtype=torch.float32)
    assert [x.schedule for x in told] == ["recompute", "save", "save"]
    assert [x.saved for x in told] == [0, M, M]


@pytest.mark.parametrize("need", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1)])
def test_only_what_needs_a_gradient_gets_one(need):
    *tensors, rows, targets, up = logprob_cases.make_inputs(N, M, D, V, bias=True)
    tensors = [x.double() for x in tensors]
    budget = budget_of(OneHead, 24, M, V, D, torch.float64)
    full = logprob_cases.run(
        one_head.selected_logprob, (*tensors, rows, targets, up), dtype=torch.float64
    )
    leaves = [x.clone().requires_grad_(bool(n)) for x, n in zip(tensors, need, strict=True)]
    hidden, weight, bias = leaves
    logp = selected_logprob(hidden, weight, rows, targets, bias=bias, budget=budget, impl="chunked")
    logp.backward(up.double())
    for x, n, name in zip(leaves, need, ("hidden", "weight", "bias"), strict=True):
        assert (x.grad is not None) == bool(n)
        if n:
            torch.testing.assert_close(x.grad, full[name], rtol=1e-11, atol=1e-12)


def test_the_same_bits_twice_and_in_a_second_backward(op):
    inputs = op.inputs(N, M, D, V, torch.float32)
    budget = budget_of(op, 24, M, V, D, torch.float32)
    kind = dict(budget=budget, impl="chunked", dtype=torch.float32)
    first, second = (op.run(op.fn, inputs, **kind) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")
def test_compiles_as_one_node(op):
    inputs = op.inputs(N, M, D, V, torch.float32)
    budget = budget_of(op, 24, M, V, D, torch.float32)
    kind = dict(budget=budget, impl="chunked", dtype=torch.float32)
    torch._dynamo.reset()
    eager = op.run(op.fn, inputs, **kind)
    compiled = op.run(torch.compile(op.fn, fullgraph=True, backend="aot_eager"), inputs, **kind)
    assert all(torch.equal(compiled[name], eager[name]) for name in eager)


def test_operator_registration():
    """A fake kernel knows how many rows are saved, and their stride."""
    hidden, weight, bias, rows, targets, up = logprob_cases.make_inputs(N, M, D, V, bias=True)
    head = (hidden, weight, bias, rows, targets)
    settings = (0.5, 4.0, "partial", budget_of(OneHead, 24, M, V, D, torch.float32, 4.0))
    fwd = torch.ops.sepo.selected_logprob_fwd.default
    torch.library.opcheck(fwd, (*head, *settings, "chunked"))
    found = fwd(*head, *settings, "chunked")
    assert 0 < found[3].shape[0] < M and found[3].stride(0) == 128
    bwd = torch.ops.sepo.selected_logprob_bwd.default
    torch.library.opcheck(bwd, (up, *head, *found, *settings, True, True, True, "chunked"))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("saved", SAVED)
def test_all_blocks_together_are_within_budget(op, saved, dtype, monkeypatch):
    monkeypatch.setattr(gemm, "WIDE_TILE_BYTES", 1 << 14)
    wide = 4001
    monkeypatch.setattr(chunked, "TILE_BYTES", {"cpu": 4 * wide})
    torch.use_deterministic_algorithms(False)  # filling with NaN is not free either
    sizes = dict(N=640, M=300, D=8, V=wide)
    budget = budget_of(op, 5 * saved, 300, wide, 8, dtype)
    inputs = op.inputs(**sizes, dtype=dtype, bias=False)
    call = lambda: op.run(op.fn, inputs, dtype=dtype, budget=budget, impl="chunked")
    call()
    others = 4 * 4 * 8 * (wide + 640) + 6 * 4 * 300 * 8 + 7 * 4 * wide + (1 << 16)
    peak = allocator_peak(call)
    assert budget / 4 < peak <= budget + others
    with Recorder() as recorder:
        call()
    largest = max(size for shape, size in recorder.made if wide in shape and 8 not in shape)
    assert largest <= budget
