"""Packed pairs against the model's own separate passes: every architecture, checkpointing, LoRA."""

import pytest
import torch
from packed_runs import assert_same, packed, run_dense, run_packed
from plain_attention import serve_varlen_anywhere
from tiny import CONFIGS, tiny_model

from sepo import attention
from sepo.model.prepare import prepare_model

# peft 0.21 asks transformers 5.23 in words of before
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
ARCHITECTURES = sorted(CONFIGS)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture
def varlen_anywhere(monkeypatch):
    serve_varlen_anywhere(monkeypatch)


@pytest.mark.parametrize("attn_impl", ["sdpa", "varlen"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_packed_equals_separate(arch, dtype, attn_impl, varlen_anywhere):
    found = run_packed(arch, dtype, attn_impl=attn_impl)
    assert_same(found, run_dense(arch, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("attn_impl", ["sdpa", "varlen"])
def test_windows_of_some_layers(attn_impl, varlen_anywhere):
    some = dict(use_sliding_window=True, sliding_window=3, max_window_layers=1)
    found = run_packed("qwen2", torch.float64, attn_impl=attn_impl, **some)
    assert_same(found, run_dense("qwen2", torch.float64, **some), 1e-10)
    with pytest.raises(AssertionError):
        assert_same(found, run_dense("qwen2", torch.float64), 1e-3)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma2"])
def test_flex_forward_equals_separate(arch):
    model = prepare_model(tiny_model(arch, dtype=torch.float64), attn_impl="flex")
    with torch.no_grad():
        logp = model(batch=packed())
    torch.testing.assert_close(logp, run_dense(arch, torch.float64)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_bfloat16_is_as_accurate_as_separate_passes(arch):
    assert_as_accurate_as_separate(arch)


@pytest.mark.native
@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen3", "gpt_neox"])
def test_the_native_kernel_is_as_accurate_as_separate_passes(arch):
    """Heads 32 wide; mistral's window bites."""
    assert_as_accurate_as_separate(arch, attn_impl="native", hidden_size=128, head_dim=32)


def assert_as_accurate_as_separate(arch, *, attn_impl=None, **overrides):
    """Both in bfloat16, against float64 with the same rounded weights."""
    truth = run_dense(arch, torch.float64, weights=torch.bfloat16, **overrides)
    errors = []
    for found in (
        run_packed(arch, torch.bfloat16, attn_impl=attn_impl, **overrides),
        run_dense(arch, torch.bfloat16, **overrides),
    ):
        logp = (found[0] - truth[0]).double().norm() / truth[0].norm()
        size = sum(g.norm() ** 2 for g in truth[1].values()) ** 0.5
        wrong = sum((found[1][n].double() - g).norm() ** 2 for n, g in truth[1].items()) ** 0.5
        errors.append((logp.item(), (wrong / size).item()))
    (logp, grad), (dense_logp, dense_grad) = errors
    assert logp <= 1.1 * dense_logp, errors
    assert grad <= 1.1 * dense_grad, errors
    assert 0 < dense_grad < 0.2, "the comparison would not notice another function"


NO_DROPOUT = {"gpt2": dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)}


@pytest.mark.parametrize("lora", [False, True], ids=["all", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_checkpointing_and_lora(arch, checkpointing, lora, varlen_anywhere):
    options = dict(checkpointing=checkpointing, lora=lora, **NO_DROPOUT.get(arch, {}))
    dense = run_dense(arch, torch.float64, **(options | dict(checkpointing=False)))
    assert_same(run_packed(arch, torch.float64, **options), dense, 1e-10)
    if checkpointing:
        assert_same(run_packed(arch, torch.float64, attn_impl="varlen", **options), dense, 1e-10)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_plain_causal_mask_fails(arch, monkeypatch):
    def causal(module, query, key, value, mask, scaling=None, **kwargs):
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None

    monkeypatch.setattr("sepo.model.prepare._check_against_itself", lambda model, impl: None)
    attention.AttentionInterface.register(attention.ATTENTION, causal)
    try:
        with pytest.raises(AssertionError):
            assert_same(run_packed(arch, torch.float64), run_dense(arch, torch.float64), 1e-3)
    finally:
        attention.AttentionInterface.register(attention.ATTENTION, attention.packed_attention)
