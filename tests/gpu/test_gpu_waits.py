"""No operation of a training step waits for the GPU."""

import pytest
import torch
from gpu import step_checks
from gpu.attention_checks import LENGTHS, SHAPE, batch_of
from gpu.wait_checks import nothing_waits, waiting_is_an_error
from tiny import tiny_model

from sepo.model.feed import feed
from sepo.model.prepare import prepare_model

# entering the mode warns that it is a prototype
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


@pytest.fixture(autouse=True)
def as_in_training():
    torch.use_deterministic_algorithms(False)


def test_a_wait_is_noticed():
    x = torch.ones(3, device="cuda")
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchroniz"):
        x.sum().item()


@pytest.mark.parametrize("impl", ["triton", "chunked"])
def test_heads_do_not_wait(impl):
    for name, call in step_checks.calls(impl, "cuda").items():
        nothing_waits(name, call)


def test_segments_do_not_wait():
    for name, call in step_checks.segment_calls("cuda").items():
        nothing_waits(name, call)


@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma2"])
def test_batches_arrive_pinned_and_nothing_waits(arch):
    """As training and scoring feed them, attention's arrays among them; values as on the CPU."""
    model = prepare_model(tiny_model(arch, dtype=torch.bfloat16, **SHAPE).to("cuda"))
    batches = [batch_of(LENGTHS, seed=seed) for seed in range(3)]
    assert batches[0].pin().pinned.is_pinned()
    packs = [lambda batch=batch: batch for batch in batches]

    def call():
        found = []
        for batch in feed(packs, model.device, [model]):
            assert batch.attention, "a layer would have to make it"
            model(batch=batch).sum().backward()
            found.append(batch)
        return found

    nothing_waits(arch, call)
    for batch, found in zip(batches, call(), strict=True):
        there = found._tensors()
        for name, tensor in batch._tensors().items():
            assert torch.equal(there[name].cpu(), tensor), name
