"""K targets within the budget: no logits beyond one target's, no second (V, D), few gathered rows."""

import pytest
import torch
from ops import implementations
from ops.k_target_cases import OVER, make_inputs, run
from ops.logprob_cases import layout
from recorder import Recorder, allocator_peak

from sepo.ops import explain_selected_logprob, selected_logprob
from sepo_kernels import gemm
from sepo_kernels.target_logits import IMPLS
from sepo_kernels.target_logits.layout import TargetLayout

N, M, D, V, K = 640, 300, 8, 4001, 12
DTYPES = [torch.float32, torch.bfloat16]
impl = implementations.fixture(IMPLS)
GATHERS = {i.name: i.gathers for i in IMPLS}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("schedule", ["save", "recompute", "frozen_head", "no_grad"])
def test_over_the_vocabulary_logits_are_within_budget(impl, schedule, dtype):
    row = layout(V, dtype, None, impl).row_bytes(gradient=schedule != "no_grad")
    budget = (M if schedule == "save" else 40) * row
    inputs = make_inputs(N, M, D, V, K, dtype=dtype, bias=True)
    with Recorder() as recorder:
        run(selected_logprob, inputs, dtype=dtype, schedule=schedule, budget=budget, impl=impl)
    head = {(V, D), (D, V), (V,), (V, 1)}  # the weight, its tiles and its gradient
    logits = [(shape, size) for shape, size in recorder.made if V in shape and shape not in head]
    fused = layout(V, dtype, None, impl).fused
    assert logits or (fused and schedule == "no_grad"), "the recorder did not see inside"
    assert max((size for _, size in logits), default=0) <= budget
    if schedule != "save":
        assert not any(M in shape for shape, _ in logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_over_the_targets_nothing_is_as_wide_as_the_vocabulary(impl, dtype):
    inputs = make_inputs(N, M, D, V, K, dtype=dtype, bias=True)
    with Recorder() as recorder:
        run(selected_logprob, inputs, dtype=dtype, over="targets", impl=impl)
    wide = {shape for shape, _ in recorder.made if V in shape}
    assert wide <= {(V, D), (V,)}, wide
    assert (M, K) in {shape for shape, _ in recorder.made}, "the recorder did not see inside"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("over", OVER)
def test_gathered_rows_of_the_head_are_within_budget(impl, over, dtype):
    """From both directions: (rows, K, D) in either dtype, together."""
    sizes = TargetLayout(M, K, D, dtype, gathers=True)
    budget = 40 * K * sizes.entry_bytes
    if over == "vocabulary":
        budget = max(budget, layout(V, dtype, None, impl).row_bytes(gradient=True))
    inputs = make_inputs(N, M, D, V, K, dtype=dtype)
    with Recorder() as recorder:
        run(selected_logprob, inputs, dtype=dtype, budget=budget, over=over, impl=impl)
    gathered = [size for shape, size in recorder.made if len(shape) == 3 and shape[-1] == D]
    assert bool(gathered) == GATHERS[impl]
    assert max(gathered, default=0) <= budget
    hidden, weight, _, rows, targets, _ = inputs
    told = explain_selected_logprob(
        hidden, weight, rows, targets, budget=budget, over=over, impl=impl
    )
    assert max(gathered, default=0) <= told.peak_bytes <= budget


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_buffers_over_the_targets_together(impl, dtype, monkeypatch):
    """Counts what ATen allocates inside an operation too. A gather of all would be M K D numbers."""
    monkeypatch.setattr(gemm, "WIDE_TILE_BYTES", 1 << 14)
    torch.use_deterministic_algorithms(False)  # filling with NaN is not free either
    N, M, D, V, K = 320, 300, 64, 301, 64
    budget = 4 * K * TargetLayout(M, K, D, dtype, gathers=True).entry_bytes
    inputs = make_inputs(N, M, D, V, K, dtype=dtype)
    call = lambda: run(
        selected_logprob, inputs, dtype=dtype, budget=budget, over="targets", impl=impl
    )
    call()
    # the leaves' clones, their gradients and float32 sums of these; (M, D) directions; (M, K)
    # numbers, of which the order of sorted targets has 8 bytes each
    others = 4 * 4 * (V * D + N * D) + 2 * 4 * M * D + 8 * 8 * M * K
    peak = allocator_peak(call)
    assert peak <= budget + others
    assert peak < M * K * D * 4 / 1.5


def test_one_gradient_of_the_head_is_alive(impl):
    """Over the vocabulary both parts lie in one (V, D): autograd alone would make two, and add them."""
    torch.use_deterministic_algorithms(False)
    N, M, D, V, K = 8, 4, 256, 4001, 3
    hidden, weight, _, rows, targets, up = make_inputs(N, M, D, V, K)
    weight.requires_grad_()
    gradient = V * D * 4

    def call(targets, up):
        logp = selected_logprob(hidden, weight, rows, targets, impl=impl)
        torch.autograd.grad(logp, weight, up)

    both = [lambda: call(targets, up), lambda: call(targets[:, 0].clamp(min=0), up[:, 0])]
    for fn in both:
        fn()
    several, one = (allocator_peak(fn) for fn in both)
    assert gradient <= one and several < one + gradient / 4
