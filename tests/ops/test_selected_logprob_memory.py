"""No logits: the largest tensor made, the peak of the allocator, and the products counted."""

import pytest
import torch
from ops import implementations
from ops.logprob_cases import SCHEDULES, layout, make_inputs, run
from recorder import Recorder, allocator_peak
from torch.utils.flop_counter import FlopCounterMode

from sepo.ops import explain_selected_logprob, selected_logprob
from sepo_kernels import gemm
from sepo_kernels.selected_logprob import IMPLS

N, M, D, V = 640, 300, 8, 4001


impl = implementations.fixture(IMPLS)


def budget_of(schedule, dtype, impl, softcap=None) -> int:  # of all rows, or of 40
    row = layout(V, dtype, softcap, impl).row_bytes(gradient=schedule != "no_grad")
    return (M if schedule == "save" else 40) * row


def of_vocabulary(shape) -> bool:
    """Logits or probabilities: V wide. The weight, its tiles and its gradient are (V, D)."""
    return V in shape and shape not in ((V, D), (D, V), (V,), (V, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_largest_logits_are_within_budget(dtype, schedule, softcap, impl):
    budget = budget_of(schedule, dtype, impl, softcap)
    inputs = make_inputs(N, M, D, V, dtype=dtype, bias=True)
    with Recorder() as recorder:
        run(
            selected_logprob, inputs, dtype=dtype, schedule=schedule, budget=budget,
            softcap=softcap, impl=impl,
        )  # fmt: skip
    logits = [(shape, size) for shape, size in recorder.made if of_vocabulary(shape)]
    fused = layout(V, dtype, softcap, impl).fused
    # a fused kernel that keeps nothing makes nothing either
    assert logits or (fused and schedule == "no_grad"), "the recorder did not see inside"
    assert max((size for _, size in logits), default=0) <= budget
    assert all(max(shape[0], shape[1]) != N and N * V > shape[0] * shape[1] for shape, _ in logits)
    if schedule != "save":
        assert not any(M in shape for shape, _ in logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_all_buffers_together_are_within_budget(dtype, schedule, impl, monkeypatch):
    """Counts what ATen allocates inside an operation too, such as the copies of a log-sum-exp."""
    monkeypatch.setattr(gemm, "WIDE_TILE_BYTES", 1 << 14)
    torch.use_deterministic_algorithms(False)  # filling with NaN is not free either
    budget = budget_of(schedule, dtype, impl)
    inputs = make_inputs(N, M, D, V, dtype=dtype)
    options = dict(schedule=schedule, budget=budget, impl=impl)
    call = lambda: run(selected_logprob, inputs, dtype=dtype, **options)
    call()
    # the leaves' clones, their gradients, float32 sums of both, and one product of a chunk
    others = 4 * 4 * (V * D + N * D) + 4 * 4 * M * D + (1 << 16)
    assert others < M * V * dtype.itemsize / 2
    peak = allocator_peak(call)
    assert budget / 4 < peak <= budget + others


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_products_as_explained(schedule):
    budget = M * V * 4 if schedule == "save" else 40 * V * 4
    inputs = make_inputs(N, M, D, V)
    counted = []

    def fn(*args, **options):
        counted.append(explain_selected_logprob(*args, **options).gemms)
        return selected_logprob(*args, **options)

    call = lambda: run(fn, inputs, dtype=torch.float32, schedule=schedule, budget=budget)
    with FlopCounterMode(display=False) as formula:
        call()
    assert counted == [{"save": 3, "recompute": 4, "frozen_head": 2, "no_grad": 1}[schedule]]
    assert formula.get_total_flops() == counted[0] * 2 * M * D * V
