"""The budget where the user gives none: by device and sizes, never by what is free at the moment."""

import pytest
import torch
from ops.kl_cases import make_inputs as kl_inputs
from ops.logprob_cases import make_inputs
from torch._subclasses import FakeTensorMode

from sepo.ops import (
    explain_selected_logprob,
    explain_selected_logprob_kl,
    selected_logprob,
    selected_logprob_kl,
)
from sepo_kernels import devices, schedules
from sepo_kernels.selected_logprob import loops
from sepo_kernels.selected_logprob.layout import HeadLayout
from sepo_kernels.selected_logprob_kl.layout import TwoHeadLayout

GIB = 1 << 30
H200, SMALL = 139 * GIB, 16 * GIB
ONE = HeadLayout(128256, torch.bfloat16, False, False, 132, 4096)
TWO = TwoHeadLayout(128256, torch.bfloat16, torch.bfloat16, False, 132, 4096)


@pytest.mark.parametrize("layout", [ONE, TWO], ids=["one", "two"])
def test_what_saving_takes_and_at_most_an_eighth_of_the_gpus_memory(layout):
    for M in (0, 1, 500, 2457, 8192, 20000):
        for memory in (SMALL, H200):
            budget = schedules.default_budget(M, layout, memory, True, True)
            assert budget <= memory // 8
            schedule = schedules.choose(M, layout, budget, True, True)
            wanted = schedules.save_bytes(M, layout)
            assert schedule == ("save" if wanted <= memory // 8 else "partial"), (M, memory)
            assert layout.peak_bytes(M, budget, schedule) <= budget
            # no more than it makes use of
            assert (
                budget
                <= wanted
                + schedules.working_rows(layout) * 3 * layout.saved_bytes
                + layout.saved_bytes
            )
    assert schedules.choose(8192, layout, schedules.default_budget(8192, layout, SMALL, True, True),
                         True, True) == "partial"  # fmt: skip
    scores = schedules.default_budget(8192, layout, H200, False, False)
    assert scores == schedules.working_rows(layout) * layout.row_bytes(gradient=False)


def test_on_a_cpu_one_gibibyte():
    hidden, weight, _, rows, targets, _ = make_inputs(8, 5, 16, 31)
    told = explain_selected_logprob(hidden.requires_grad_(), weight, rows, targets)
    assert told.budget == GIB and told.saved == 0
    assert told.reasons[-1] == f"budget {GIB} bytes, the default of a CPU"
    inputs = kl_inputs(8, 5, 16, 16, 31)
    assert inputs.call(explain_selected_logprob_kl).reasons[-1] == told.reasons[-1]


@pytest.fixture
def a_gpu_of_one_mebibyte(monkeypatch):
    monkeypatch.setattr(devices, "multiprocessors", lambda device: 2)
    monkeypatch.setattr(devices, "memory", lambda device: 1 << 20)


def test_where_it_comes_from(a_gpu_of_one_mebibyte):
    hidden, weight, _, rows, targets, _ = make_inputs(8, 5, 16, 31)
    hidden.requires_grad_(), weight.requires_grad_()
    explain = lambda *args, **o: explain_selected_logprob(hidden, weight, *args, **o)
    assert explain(rows, targets).reasons[-1] == "budget 640 bytes, what the call makes use of"
    assert explain(rows, targets, budget=512).reasons[-1] == "budget 512 bytes, as given"
    many = explain(rows.repeat(10_000), targets.repeat(10_000))
    assert many.reasons[-1] == "budget 131072 bytes, 1/8 of the memory of cpu"
    assert many.schedule == "partial"


def test_a_budget_beyond_the_gpus_memory_is_refused(a_gpu_of_one_mebibyte):
    hidden, weight, _, rows, targets, _ = make_inputs(8, 5, 16, 31)
    message = "expected a budget of at most 1048576 bytes, the memory of cpu, got 1048577"
    for fn in (selected_logprob, explain_selected_logprob):
        with pytest.raises(ValueError, match=message):
            fn(hidden, weight, rows, targets, budget=(1 << 20) + 1)
    for fn in (selected_logprob_kl, explain_selected_logprob_kl):
        with pytest.raises(ValueError, match=message):
            kl_inputs(8, 5, 16, 16, 31).call(fn, budget=(1 << 20) + 1)


def test_memory_that_does_not_suffice_is_one_line(monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB.\nA page of advice"
        )

    monkeypatch.setattr(loops, "new_block", full)
    hidden, weight, _, rows, targets, _ = make_inputs(8, 5, 16, 31)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        selected_logprob(hidden.requires_grad_(), weight, rows, targets, budget=4096)
    assert str(caught.value) == (
        "expected 4096 bytes for logits or probabilities (budget=, --head_budget) and the gradients"
        " beside them, got: CUDA out of memory. Tried to allocate 2.00 GiB."
    )


def test_a_compiler_takes_the_gpus_numbers_as_constants():
    """One graph, dynamic or not, whose decisions are those of the device."""

    def fn(x):
        device = torch.device("cuda", 0)
        budget = min(x.shape[0], devices.memory(device)) + devices.multiprocessors(device)
        return x * (2 if budget < 100 else 3)

    for dynamic in (None, True):
        torch._dynamo.reset()
        compiled = torch.compile(fn, fullgraph=True, backend="eager", dynamic=dynamic)
        for n in (3, 5):
            assert torch.equal(compiled(torch.ones(n)), fn(torch.ones(n)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_fake_tensors_of_a_gpu_that_is_not_here_have_one():
    with FakeTensorMode():
        device = torch.empty(3, device="cuda").device
    assert devices.multiprocessors(device) == 132 and devices.memory(device) == 80 * GIB
    assert devices.multiprocessors(torch.device("cpu")) == 0
