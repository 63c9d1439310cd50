"""The checks of this folder on a CPU, in small: that they run, and that they notice what is wrong."""

import pytest
import torch
from gpu import head_checks, sanitized, segment_checks, step_checks
from native_kernels import LACKING
from ops.implementations import on_cpu
from ops.k_target_cases import OVER
from ops.kl_cases import DIRECTIONS

from sepo_kernels import gemm, segment_reduce
from sepo_kernels.segment_topk import IMPLS as TOPK

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads(dtype):
    for M in (0, 72):
        head_checks.logprob("chunked", "cpu", (40, M, 24, 101), dtype, "all")
        for direction in DIRECTIONS:
            head_checks.kl("chunked", "cpu", (40, M, 24, 16, 101), dtype, "all", direction)
    for over in OVER:
        head_checks.k_targets("chunked", "cpu", (40, 72, 24, 101, 3), dtype, over)


def test_confident_rows_and_far_rows():
    args = ("chunked", "cpu", 16, 48, 4001)
    head_checks.nats_of_confident_and_unlikely_rows(*args, torch.bfloat16)
    head_checks.rows_far_into_the_logits(*args, ends=3)
    head_checks.kl_rows_far_into_the_logits(*args, ends=3)


def test_repetition_and_steps():
    head_checks.repeatable("chunked", "cpu", 8, 72, 12, 101, torch.float32)
    step_checks.autocast_changes_nothing("chunked", "cpu")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")
def test_compilation():
    step_checks.compiles("chunked", "cpu", "aot_eager")


@pytest.mark.parametrize("schedule", head_checks.KL_SCHEDULES)
def test_memory(schedule):
    torch.use_deterministic_algorithms(False)  # filling with NaN takes memory too
    sizes = dict(N=2048, M=300, D=4, V=5003, dtype=torch.float32, schedule=schedule)
    step_checks.kl_memory("chunked", "cpu", **sizes)
    if schedule in head_checks.LOGPROB_SCHEDULES:
        step_checks.logprob_memory("chunked", "cpu", **sizes)


def test_calls_of_a_step():
    for call in step_checks.calls("chunked", "cpu").values():
        call()
    for name, call in step_checks.segment_calls("cpu").items():
        if not LACKING or "native" not in name:
            call()


@pytest.mark.parametrize("lengths", [segment_checks.RAGGED, segment_checks.SHORT, ()], ids=len)
def test_segments(lengths):
    for impl in on_cpu(TOPK):
        for side in ("highest", "alternate"):
            segment_checks.topk(impl, "cpu", lengths, torch.bfloat16, side)
    for impl in on_cpu(segment_reduce.IMPLS) if lengths else ():
        segment_checks.sums(impl, "cpu", lengths, torch.float32)


@pytest.mark.native
def test_sanitised_program():
    assert sanitized.run("cpu") > 0


def test_an_error_that_only_float32_inputs_would_hide_is_noticed(monkeypatch):
    """Logits rounded to bfloat16, as a product without a float32 output would leave them."""
    right = gemm.logits

    def rounded(out, x, weight):
        right(out, x, weight)
        out.copy_(out.bfloat16())

    monkeypatch.setattr(gemm, "logits", rounded)
    with pytest.raises(AssertionError, match="off by"):
        head_checks.logprob("chunked", "cpu", (40, 72, 24, 101), torch.bfloat16, "plain")
    with pytest.raises(AssertionError, match="off by"):
        head_checks.nats_of_confident_and_unlikely_rows(
            "chunked", "cpu", 16, 48, 4001, torch.bfloat16
        )


def test_a_write_beyond_the_selected_rows_is_noticed(monkeypatch):
    from sepo_kernels.selected_logprob import loops

    right = loops.add_rows
    monkeypatch.setattr(
        loops, "add_rows", lambda total, rows, values: right(total, rows.flip(0) // 2, values)
    )
    with pytest.raises(AssertionError):
        head_checks.rows_far_into_the_logits("chunked", "cpu", 16, 48, 101, ends=3)
