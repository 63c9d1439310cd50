"""The router loss of a mixture of experts: transformers' own, of each pair's two sequences."""

import json

import numpy as np
import pytest
import torch
from tiny import random_scored_pairs, tiny_model
from tiny_trainer import LONGEST, PAIRS, bare, make_trainer, weights

from sepo.errors import InputError
from sepo.model import routers
from sepo.trainer.pairs import PreparedPairs

# peft 0.21 asks transformers 5.23 by an old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
COEFFICIENT = 0.3
EXPERTS = {
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8,
        decoder_sparse_step=1,
    ),
    "olmoe": dict(num_experts=4, num_experts_per_tok=3),
    "qwen2_moe": dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
}  # fmt: skip


def moe(arch="mixtral", **more):
    asked = dict(output_router_logits=True, router_aux_loss_coef=COEFFICIENT)
    return tiny_model(arch, **{**EXPERTS[arch], **asked, **more})


def sequences(pair, args):
    """What the batch reads of a pair, as separate sequences."""
    prompt, *responses = PreparedPairs([pair], args)[0]
    return [np.concatenate([prompt, r.response]) for r in responses if len(r.positions)]


def own_loss(model, batch):
    """transformers' on sequences padded to one length."""
    length = max(map(len, batch))
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, sequence in enumerate(batch):
        ids[i, : len(sequence)] = torch.from_numpy(sequence)
        mask[i, : len(sequence)] = 1
    return model(input_ids=ids, attention_mask=mask, use_cache=False).aux_loss


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def step_of(trainer):
    """Loss and gradient of the first step; the log of it."""
    model = trainer.model
    trainer.train()
    return trainer.state.log_history[0], model


@pytest.mark.parametrize("arch", EXPERTS)
@pytest.mark.parametrize("method", ["sepo", "dpo", "sft"])
def test_a_step_adds_what_transformers_defines(tmp_path, arch, method):
    """By the difference that the loss makes to one step of plain gradient descent."""
    pairs, rate = random_scored_pairs(4, seed=3), 0.5
    common = dict(
        pairs=pairs, method=method, pairs_per_step=len(pairs), learning_rate=rate, warmup_steps=0,
        lr_scheduler_type="constant", fraction=0.5,
    )  # fmt: skip
    with_loss = make_trainer(tmp_path, model=moe(arch), **common)
    without = make_trainer(tmp_path, model=moe(arch, output_router_logits=False), **common)
    with_loss.train(), without.train()
    model, total, share = moe(arch), 0.0, []
    for pair in pairs:
        prepared = PreparedPairs([pair], with_loss.args)
        share.append(prepared.selected[0] if method == "sft" else 1)
    for pair, part in zip(pairs, share, strict=True):
        total = total + own_loss(model, sequences(pair, with_loss.args)) * part / sum(share)
    (COEFFICIENT * total).backward()
    grads = gradients(model)
    for name, parameter in model.named_parameters():
        moved = weights(without)[name] - weights(with_loss)[name]
        expected = rate * grads.get(name, torch.zeros_like(parameter))
        torch.testing.assert_close(moved, expected, rtol=0, atol=2e-6)
    log, plain = (t.state.log_history[0] for t in (with_loss, without))
    assert log["loss"] - plain["loss"] == pytest.approx(COEFFICIENT * total.item(), abs=1e-5)
    assert "aux_loss" not in plain
    mean = sum(own_loss(model, sequences(p, with_loss.args)).item() for p in pairs) / len(pairs)
    assert log["aux_loss"] == pytest.approx(mean, abs=1e-5)
    assert any("gate" in name and grad.abs().max() > 1e-3 for name, grad in grads.items())


@pytest.mark.parametrize("method", ["sepo", "tdpo2", "sft"])
@pytest.mark.parametrize("budget", [LONGEST, 64])
def test_the_budget_changes_nothing(tmp_path, method, budget):
    run = lambda tokens: make_trainer(
        tmp_path,
        model=moe(),
        reference_model=moe(seed=1) if method == "tdpo2" else None,
        method=method,
        max_tokens_per_batch=tokens,
    )
    whole, split = run(None), run(budget)
    whole.train(), split.train()
    for name, expected in weights(whole).items():
        torch.testing.assert_close(weights(split)[name], expected, rtol=0, atol=1e-5)
    lines = zip(whole.state.log_history, split.state.log_history, strict=True)
    for a, b in lines:
        assert a.get("aux_loss") == pytest.approx(b.get("aux_loss"), abs=1e-5)


@pytest.mark.parametrize("how", ["gradient_checkpointing", "recompute", "lora"])
def test_with_layers_made_again_and_with_adapters(tmp_path, how):
    args = dict(gradient_checkpointing=True) if how == "gradient_checkpointing" else {}
    args |= dict(selective_checkpointing=True) if how == "recompute" else {}
    run = dict(pairs=bare(PAIRS), method="simpo", warmup_steps=0)
    plain = make_trainer(tmp_path / "a", model=moe(), **run)
    if how == "lora":
        peft = pytest.importorskip("peft")
        args["peft_config"] = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    other = make_trainer(tmp_path / "b", model=moe(), **run, **args)
    plain.train(), other.train()
    first, same = plain.state.log_history[0], other.state.log_history[0]
    assert same["aux_loss"] == pytest.approx(first["aux_loss"], abs=1e-5)
    assert same["loss"] == pytest.approx(first["loss"], abs=1e-5)
    if how != "lora":
        for name, expected in weights(plain).items():
            torch.testing.assert_close(weights(other)[name], expected, rtol=0, atol=1e-5)


def test_an_evaluation_counts_it_too(tmp_path):
    pairs = random_scored_pairs(3, seed=3)
    trainer = make_trainer(tmp_path, model=moe(), pairs=pairs, eval_pairs=pairs, method="simpo")
    found, model = trainer.evaluate(), moe()
    mean = sum(own_loss(model, sequences(p, trainer.args)).item() for p in pairs) / 3
    assert found["eval_aux_loss"] == pytest.approx(mean, abs=1e-5)
    plain = make_trainer(
        tmp_path,
        model=moe(output_router_logits=False),
        pairs=pairs,
        eval_pairs=pairs,
        method="simpo",
    ).evaluate()
    assert found["eval_loss"] - plain["eval_loss"] == pytest.approx(COEFFICIENT * mean, abs=1e-5)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert line["eval_aux_loss"] == found["eval_aux_loss"]


def test_a_batch_of_no_pairs_has_none():
    from sepo.data import pack

    loss = routers.router_loss(moe())
    assert loss([torch.randn(1, 4)], pack([])).shape == (0,)


def test_the_coefficient_is_the_models():
    assert routers.router_loss(moe(router_aux_loss_coef=0.125)).coefficient == 0.125
    assert routers.router_loss(moe(output_router_logits=False)) is None
    assert routers.router_loss(tiny_model()) is None


def test_a_loss_of_another_kind_is_refused(tmp_path, monkeypatch):
    import transformers.models.mixtral.modeling_mixtral as module

    monkeypatch.setattr(module, "load_balancing_loss_func", lambda gates, keys, experts, mask: 0)
    with pytest.raises(
        InputError, match="MixtralForCausalLM: output_router_logits asks for a loss"
    ):
        make_trainer(tmp_path / "out", model=moe())
    assert not (tmp_path / "out").exists()


def bamba(**more):
    """Its layers read states of the sequence before; those of attention alone could be packed."""
    shape = dict(mamba_n_heads=4, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8)
    return tiny_model("bamba", **{**shape, **more})


def test_bamba_is_refused_by_its_layers(tmp_path):
    with pytest.raises(InputError, match="BambaForCausalLM is not supported: "):
        make_trainer(tmp_path, model=bamba(attn_layer_indices=[1]))


def test_a_loss_on_logits_is_refused_by_name(tmp_path):
    """Bamba's, with attention alone, which is served without it."""
    attention = dict(attn_layer_indices=[0, 1])
    make_trainer(tmp_path, model=bamba(**attention))
    expected = "BambaForCausalLM: z_loss_coefficient 0.01 asks for a loss on the logits of all tok"
    with pytest.raises(InputError, match=expected):
        make_trainer(tmp_path, model=bamba(**attention, z_loss_coefficient=0.01))
