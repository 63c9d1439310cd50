"""No logits: the largest tensor made, the peak of the allocator, and the products counted."""

import pytest
import torch
from ops.logprob_cases import SCHEDULES, make_inputs, run
from recorder import Recorder
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from sepo.ops import explain_selected_logprob, selected_logprob
from sepo_kernels.selected_logprob import chunked

N, M, D, V = 640, 300, 8, 4001
ROW = {torch.float32: 4, torch.bfloat16: 6}  # bytes of a chunk's buffers for one logit


def of_vocabulary(shape) -> bool:
    """Logits or probabilities: V wide. The weight, its tiles and its gradient are (V, D)."""
    return V in shape and shape not in ((V, D), (D, V), (V,), (V, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_largest_logits_are_within_budget(dtype, schedule, softcap):
    row = V * (ROW[dtype] + (4 if softcap else 0))
    budget = M * row if schedule == "save" else 40 * row
    inputs = make_inputs(N, M, D, V, dtype=dtype, bias=True)
    with Recorder() as recorder:
        run(
            selected_logprob, inputs, dtype=dtype, schedule=schedule, budget=budget,
            softcap=softcap,
        )  # fmt: skip
    logits = [(shape, size) for shape, size in recorder.made if of_vocabulary(shape)]
    assert logits, "the recorder did not see inside the operator"
    assert max(size for _, size in logits) <= budget
    assert all(max(shape[0], shape[1]) != N and N * V > shape[0] * shape[1] for shape, _ in logits)
    if schedule != "save":
        assert not any(M in shape for shape, _ in logits)


def allocator_peak(fn) -> int:
    """Largest number of bytes alive above the start, as the allocator saw it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        fn()
    events = prof.profiler.kineto_results.events()
    sizes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    alive = peak = 0
    for _, size in sorted(sizes, key=lambda pair: pair[0]):
        alive += size
        peak = max(peak, alive)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_all_buffers_together_are_within_budget(dtype, schedule, monkeypatch):
    """Counts what ATen allocates inside an operation too, such as the copies of a log-sum-exp."""
    monkeypatch.setattr(chunked, "WEIGHT_TILE_BYTES", 1 << 14)
    torch.use_deterministic_algorithms(False)  # filling with NaN is not free either
    row = V * ROW[dtype]
    budget = M * row if schedule == "save" else 40 * row
    inputs = make_inputs(N, M, D, V, dtype=dtype)
    call = lambda: run(selected_logprob, inputs, dtype=dtype, schedule=schedule, budget=budget)
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
