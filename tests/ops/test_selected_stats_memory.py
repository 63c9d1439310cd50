"""No logits beyond the budget: the largest tensor made, the peak, and the products counted."""

import pytest
import torch
from ops import implementations, logprob_cases
from ops.stats_cases import WAYS, entropy_layout, make_inputs, run
from recorder import Recorder, allocator_peak
from torch.utils.flop_counter import FlopCounterMode

from sepo.ops import explain_selected_stats, selected_stats
from sepo_kernels import gemm
from sepo_kernels.selected_logprob_kl import chunked
from sepo_kernels.selected_stats import IMPLS
from sepo_kernels.selected_stats.layout import FUSED_SUMS

N, M, D, V = 640, 300, 8, 4001


impl = implementations.fixture(IMPLS)


def layout_of(way, dtype, impl, softcap):
    if WAYS[way].entropy_grad:
        return entropy_layout(V, dtype, impl)
    layout = logprob_cases.layout(V, dtype, softcap, impl)
    return layout._replace(fused_sums=FUSED_SUMS)


def budget_of(way, dtype, impl, softcap=None) -> int:  # of all rows, or of 40
    schedule, layout = WAYS[way].schedule, layout_of(way, dtype, impl, softcap)
    if schedule == "save" and WAYS[way].entropy_grad:
        return M * (layout.saved_bytes + layout.gradient_bytes)
    return (M if schedule == "save" else 40) * layout.row_bytes(gradient=schedule != "no_grad")


def call(way, inputs, dtype, budget, impl, **options):
    schedule, _, entropy_grad = WAYS[way]

    def fn(*args, **kind):
        assert explain_selected_stats(*args, **kind).schedule == schedule
        return selected_stats(*args, **kind)

    return run(
        fn, inputs, dtype=dtype, way=way, budget=budget, impl=impl, entropy_grad=entropy_grad,
        **options,
    )  # fmt: skip


def of_vocabulary(shape) -> bool:
    """Logits or their gradient: V wide. The weight, its tiles and its gradient are (V, D)."""
    return V in shape and shape not in ((V, D), (D, V), (V,), (V, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_largest_logits_are_within_budget(dtype, way, softcap, impl):
    budget = budget_of(way, dtype, impl, softcap)
    inputs = make_inputs(N, M, D, V, dtype=dtype, bias=True)
    with Recorder() as recorder:
        call(way, inputs, dtype, budget, impl, softcap=softcap)
    logits = [(shape, size) for shape, size in recorder.made if of_vocabulary(shape)]
    fused = layout_of(way, dtype, impl, softcap).fused
    # a fused kernel that keeps nothing makes nothing either
    assert logits or (fused and way == "no_grad"), "the recorder did not see inside"
    assert max((size for _, size in logits), default=0) <= budget
    if WAYS[way].schedule != "save":
        assert not any(M in shape for shape, _ in logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_all_buffers_together_are_within_budget(dtype, way, impl, monkeypatch):
    """Counts what ATen allocates inside an operation too, such as the copies of a log-sum-exp."""
    monkeypatch.setattr(gemm, "WIDE_TILE_BYTES", 1 << 14)
    # one row, up to six temporaries
    monkeypatch.setattr(chunked, "TILE_BYTES", {"cpu": 4 * V})
    torch.use_deterministic_algorithms(False)  # filling with NaN is not free either
    budget = budget_of(way, dtype, impl)
    inputs = make_inputs(N, M, D, V, dtype=dtype)
    again = lambda: call(way, inputs, dtype, budget, impl)
    again()
    # the leaves' clones, their gradients, float32 sums of both, one product of a chunk, numbers
    others = 4 * 4 * (V * D + N * D) + 4 * 4 * M * D + 4 * 30 * M + 6 * 4 * V + (1 << 16)
    assert others < M * V * dtype.itemsize / 2
    peak = allocator_peak(again)
    assert (way == "no_grad" or budget / 4 < peak) and peak <= budget + others


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", ["save", "recompute", "frozen_head", "no_grad"])
def test_a_metric_takes_no_more_memory_than_the_log_probability(impl, schedule, dtype):
    torch.use_deterministic_algorithms(False)
    budget = budget_of(schedule, dtype, impl)
    inputs = make_inputs(N, M, D, V, dtype=dtype)
    alone = lambda: logprob_cases.run(
        logprob_cases.selected_logprob, inputs, dtype=dtype, schedule=schedule, budget=budget,
        impl=impl,
    )  # fmt: skip
    metric = lambda: call(schedule, inputs, dtype, budget, impl)
    alone(), metric()
    # five numbers more a row; tiles of a few rows in plain PyTorch
    more = 4 * 12 * M + (6 << 20 if impl == "chunked" else 0)
    assert allocator_peak(metric) <= allocator_peak(alone) + more


@pytest.mark.parametrize("way", WAYS)
def test_products_as_explained(way, impl):
    budget, inputs = budget_of(way, torch.float32, impl), make_inputs(N, M, D, V)
    counted = []

    def fn(*args, **options):
        counted.append(explain_selected_stats(*args, **options).gemms)
        return selected_stats(*args, **options)

    options = dict(way=way, budget=budget, entropy_grad=WAYS[way].entropy_grad, impl=impl)
    with FlopCounterMode(display=False) as formula:
        run(fn, inputs, dtype=torch.float32, **options)
    assert counted == [
        {
            "save": 3, "recompute": 4, "frozen_head": 2, "no_grad": 1, "entropy save": 3,
            "entropy save frozen": 2, "entropy recompute": 4, "entropy recompute frozen": 3,
        }[way]
    ]  # fmt: skip
    assert formula.get_total_flops() == counted[0] * 2 * M * D * V
