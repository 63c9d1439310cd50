"""No logits of either head: the largest block made, the allocator's peak, the products counted."""

import pytest
import torch
from ops import implementations
from ops.kl_cases import SCHEDULES, make_inputs, run
from recorder import Recorder, allocator_peak
from torch.utils.flop_counter import FlopCounterMode

from sepo.ops import explain_selected_logprob_kl, selected_logprob_kl
from sepo_kernels import gemm
from sepo_kernels.selected_logprob_kl import IMPLS, chunked
from sepo_kernels.selected_logprob_kl.layout import TwoHeadLayout

N, M, D, D_REF, V = 640, 300, 8, 6, 4001
DIRECTIONS = {"ref||policy": 0.0, "policy||ref": 1.0, ("jsd", 0.3): 0.3}  # -> beta
GEMMS = {"save": 4, "save frozen": 3, "recompute": 6, "frozen_head": 4, "no_grad": 2}


impl = implementations.fixture(IMPLS)


def layout(dtype, impl: str, direction="ref||policy") -> TwoHeadLayout:
    kernels = next(x for x in IMPLS if x.name == impl).kernels
    return kernels.layout(V, dtype, DIRECTIONS[direction])


def budget_of(kind: str, dtype, impl: str, direction="ref||policy") -> int:  # of all rows, or of 40
    row = layout(dtype, impl, direction).row_bytes(gradient=kind != "no_grad")
    return (M if kind.startswith("save") else 40) * row


def of_vocabulary(shape) -> bool:
    """Logits, probabilities or their gradient: V wide. Weights and their tiles are (V, D)."""
    narrow = ((V, D), (D, V), (V, D_REF), (D_REF, V), (V,), (V, 1))
    return V in shape and shape not in narrow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(
    "options", [{}, dict(softcap=4.0), dict(direction=("jsd", 0.3), softcap=4.0)], ids=str
)
def test_largest_block_is_within_budget(impl, dtype, kind, options):
    direction = options.get("direction", "ref||policy")
    i = make_inputs(N, M, D, D_REF, V, dtype=dtype, bias=True)
    budget = budget_of(kind, dtype, impl, direction)
    with Recorder() as record:
        run(selected_logprob_kl, i, schedule=kind, budget=budget, impl=impl, **options)
    blocks = [(shape, size) for shape, size in record.made if of_vocabulary(shape)]
    # a fused kernel that keeps nothing makes nothing either
    unseen = layout(dtype, impl, direction).fused and kind == "no_grad"
    assert blocks or unseen, "the recorder did not see inside the operator"
    assert max((size for _, size in blocks), default=0) <= budget
    assert all(max(shape[:2]) != N and N * V > shape[0] * shape[1] for shape, _ in blocks)
    if not kind.startswith("save"):
        assert not any(M in shape for shape, _ in blocks)


@pytest.mark.parametrize("direction", DIRECTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_all_blocks_together_are_within_budget(impl, dtype, kind, direction, monkeypatch):
    """Counts what ATen allocates inside an operation too, such as the copies of a log-sum-exp."""
    monkeypatch.setattr(gemm, "WIDE_TILE_BYTES", 1 << 14)
    monkeypatch.setattr(chunked, "TILE_BYTES", {"cpu": 4 * V})  # one row, up to seven temporaries
    torch.use_deterministic_algorithms(False)  # filling with NaN is not free either
    budget = budget_of(kind, dtype, impl, direction)
    i = make_inputs(N, M, D, D_REF, V, dtype=dtype)
    options = dict(schedule=kind, budget=budget, direction=direction, impl=impl)
    call = lambda: run(selected_logprob_kl, i, **options)
    call()
    # the leaves' clones, their gradients, float32 sums of both, a chunk's products, the tile
    others = 4 * 4 * (V * D + N * D) + 6 * 4 * M * D + 7 * 4 * V + (1 << 16)
    assert others < M * V * dtype.itemsize / 2
    peak = allocator_peak(call)
    assert budget / 8 < peak <= budget + others


@pytest.mark.parametrize("kind", SCHEDULES)
def test_products_as_explained(impl, kind):
    i = make_inputs(N, M, D, D, V)
    counted = []

    def fn(*args, **options):
        counted.append(explain_selected_logprob_kl(*args, **options).gemms)
        return selected_logprob_kl(*args, **options)

    with FlopCounterMode(display=False) as formula:
        run(fn, i, schedule=kind, budget=budget_of(kind, torch.float32, impl), impl=impl)
    assert counted == [GEMMS[kind]]
    assert formula.get_total_flops() == GEMMS[kind] * 2 * M * D * V


@pytest.mark.parametrize("kind", SCHEDULES)
def test_products_of_heads_of_two_widths(impl, kind):
    i = make_inputs(N, M, D, D_REF, V)
    with FlopCounterMode(display=False) as formula:
        budget = budget_of(kind, torch.float32, impl)
        run(selected_logprob_kl, i, schedule=kind, budget=budget, impl=impl)
    references = {"recompute": 2}.get(kind, 1)
    policies = GEMMS[kind] - references
    assert formula.get_total_flops() == 2 * M * V * (policies * D + references * D_REF)


@pytest.mark.parametrize("kind", ["recompute", "frozen_head", "no_grad"])
def test_explained_bytes_are_within_budget(impl, kind):
    """For any budget of a row or more, small or large, and any number of rows."""
    for dtype in (torch.float32, torch.bfloat16):
        row = TwoHeadLayout(V, dtype, dtype, False).row_bytes(gradient=True)
        for rows in (1, 1.5, 17, 40.3, 299, 300, 1000):
            i = make_inputs(8, 300, 2, 2, V, dtype=dtype)
            seen = []

            def fn(*args, seen=seen, **options):
                seen.append(explain_selected_logprob_kl(*args, **options))
                return (torch.zeros(300, requires_grad=True),) * 3

            leaves = [x.requires_grad_() for x in i[: {"recompute": 2}.get(kind, 1)]]
            with torch.set_grad_enabled(kind != "no_grad" and bool(leaves)):
                i.call(fn, budget=int(rows * row), impl=impl)
            assert 0 < seen[0].peak_bytes <= int(rows * row)
