"""hidden_states and token_logprob on packed pairs against the model's own separate passes."""

import numpy as np
import pytest
import torch
from dense import dense_token_logprob, random_triples
from tiny import CONFIGS, V, tiny_model

from sepo import attention
from sepo.data import all_positions, pack, truncate
from sepo.errors import InputError
from sepo.model import head, load_model, prepare_model, token_logprob

ARCHITECTURES = sorted(CONFIGS)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def packed_and_dense(arch, dtype, *, patch=lambda model: None):
    """Log-probabilities and parameter gradients, both ways, from the same weights."""
    triples = random_triples(np.random.default_rng(7), pairs=5, vocab_size=V)
    whole = lambda response: truncate(response, all_positions(len(response)))
    batch = pack([(p, whole(c), whole(r)) for p, c, r in triples])
    upstream = torch.randn(len(batch.targets), generator=torch.Generator().manual_seed(1))
    results = []
    for compute in (
        lambda model: token_logprob(prepare_model(model), batch),
        lambda model: torch.cat(
            [dense_token_logprob(model, p, y) for p, c, r in triples for y in (c, r)]
        ),
    ):
        model = tiny_model(arch, dtype=dtype)
        patch(model)
        logp = compute(model)
        logp.backward(upstream.to(logp.dtype))
        results.append((logp.detach(), {n: p.grad for n, p in model.named_parameters()}))
    return results


def assert_same(packed, dense, tolerance):
    torch.testing.assert_close(packed[0], dense[0].to(packed[0].dtype), rtol=0, atol=tolerance)
    assert packed[1].keys() == dense[1].keys()
    for name, grad in dense[1].items():
        scale = grad.abs().max().clamp(min=1)  # a gradient sums over rows: relative to its size
        error = (packed[1][name] - grad).abs().max() / scale
        assert error <= tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_packed_equals_separate(arch, dtype):
    assert_same(*packed_and_dense(arch, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_plain_causal_mask_fails(arch, monkeypatch):
    def causal(module, query, key, value, mask, scaling=None, **kwargs):
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None

    monkeypatch.setattr("sepo.model._check_against_itself", lambda model: None)
    attention.AttentionInterface.register(attention.ATTENTION, causal)
    try:
        with pytest.raises(AssertionError):
            assert_same(*packed_and_dense(arch, torch.float64), 1e-3)
    finally:
        attention.AttentionInterface.register(attention.ATTENTION, attention.packed_attention)


def test_gradient_checkpointing_changes_nothing():
    def checkpoint(model):
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()  # its name before transformers 5.20
        model.train()

    packed, dense = packed_and_dense("llama", torch.float64)[0], None
    checkpointed, dense = packed_and_dense("llama", torch.float64, patch=checkpoint)
    assert_same(checkpointed, dense, 1e-10)
    assert_same(checkpointed, packed, 1e-10)


def test_a_batch_without_pairs_reaches_every_parameter():
    model = prepare_model(tiny_model("llama"))
    logp = token_logprob(model, pack([]))
    assert logp.shape == (0,)
    logp.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_any_other_call_needs_another_attention():
    model = prepare_model(tiny_model("llama"))
    ids = torch.arange(5)[None]
    with pytest.raises(InputError, match="no PackedBatch reached the attention"):
        model(input_ids=ids)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(input_ids=ids).logits, tiny_model("llama")(ids).logits)


@pytest.mark.parametrize(
    ("arch", "overrides", "reason"),
    [
        ("gemma2", dict(head_dim=8), "soft-capped at 50"),
        ("mistral", dict(sliding_window=8), "sliding window of 8 tokens"),
        (
            "qwen2",
            dict(use_sliding_window=True, sliding_window=8, max_window_layers=0),
            "layers of type sliding_attention",
        ),
        ("gpt2", dict(add_cross_attention=True), "cross attention"),
        (
            "llama",
            dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)),
            r"rotary embedding \(dynamic\)",
        ),
        ("bloom", dict(n_head=4), "attention interface"),
    ],
)
def test_refused_by_name(arch, overrides, reason):
    model = tiny_model(arch, **overrides)
    with pytest.raises(InputError, match=f"{type(model).__name__} is not supported: .*{reason}"):
        prepare_model(model)


def test_a_transform_that_no_name_gives_away_is_refused():
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, logits: logits * 1.01)
    with pytest.raises(InputError, match="differ from its own by"):
        prepare_model(model)


def test_scaled_logits_are_read_from_the_config():
    assert head(tiny_model("granite", logits_scaling=4.0)).scale == 0.25
    prepare_model(tiny_model("granite", logits_scaling=4.0))  # compares with the model itself


def test_a_head_that_is_not_one_matrix_is_refused():
    model = tiny_model("qwen2")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(InputError, match="expected an nn.Linear head, got Sequential"):
        prepare_model(model)


def test_a_prepared_model_is_not_probed_again(monkeypatch):
    model = prepare_model(tiny_model("llama"))
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr("sepo.model._check_against_itself", lambda model: pytest.fail("probed"))
    assert prepare_model(model).config._attn_implementation == attention.ATTENTION


def test_a_copy_of_a_prepared_model_uses_its_own_weights():
    import copy

    model = prepare_model(tiny_model("llama"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    triples = random_triples(np.random.default_rng(0), pairs=1, vocab_size=V)
    whole = lambda response: truncate(response, all_positions(len(response)))
    batch = pack([(p, whole(c), whole(r)) for p, c, r in triples])
    torch.testing.assert_close(
        twin(batch=batch), torch.full((len(batch.targets),), -np.log(V), dtype=torch.float32)
    )


def test_a_saved_prepared_model_loads_anywhere(tmp_path):
    prepare_model(tiny_model("llama")).save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    assert load_model(str(tmp_path)).config._attn_implementation == attention.ATTENTION


def test_what_cannot_be_loaded_is_one_line(tmp_path):
    with pytest.raises(InputError, match="can't load a model from .*nowhere"):
        load_model(str(tmp_path / "nowhere"))
