"""The attention checks on a CPU, in small: that they run, and that they notice what is wrong."""

from dataclasses import replace

import pytest
import torch
from gpu import attention_checks as checks
from plain_attention import serve_varlen_anywhere

from sepo.attention import layout, sdpa

SMALL = [(15, 7, 20), (5, 0, 4), (6, 9, 0), (1, 1, 1)]


@pytest.fixture(autouse=True)
def varlen_anywhere(monkeypatch):
    serve_varlen_anywhere(monkeypatch)


@pytest.mark.parametrize("options", checks.OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["varlen", "sdpa"])
def test_values_and_gradients(impl, dtype, options):
    checks.attention(impl, "cpu", dtype, (6, 2, 16), checks.OPTIONS[options], SMALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma2"])
def test_models(arch, dtype):
    checks.model("sdpa", "cpu", dtype, arch)


@pytest.mark.parametrize("autocast", [False, True])
def test_steps(autocast):
    checks.step("varlen", "cpu", torch.float32, autocast=autocast)()
    checks.repeatable("varlen", "cpu", torch.float32)


def test_memory():
    torch.use_deterministic_algorithms(False)  # filling with NaN takes memory too
    sizes = dict(prompt=20, response=20, pairs=80, heads=(2, 1, 8))
    checks.memory("sdpa", "cpu", torch.float32, **sizes)


def test_a_causal_mask_over_the_buffer_is_noticed(monkeypatch):
    def causal(spans, terms, arrays):
        end = spans[-1][-1]
        return sdpa.build(((0, 1, end, end),), terms, arrays)

    entry = replace(layout.IMPLS[-1], build=causal)
    monkeypatch.setattr(layout, "IMPLS", (*layout.IMPLS[:-1], entry))
    with pytest.raises(AssertionError, match="sdpa torch.bfloat16 output: error"):
        checks.attention("sdpa", "cpu", torch.bfloat16, (6, 2, 16), {}, SMALL)
