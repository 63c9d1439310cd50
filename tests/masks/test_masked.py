"""SparsePO's mask in training: it learns beside anything, and is saved beside the model."""

import json

import pytest
import torch
from safetensors import safe_open
from tiny import random_scored_pairs, tiny_model
from tiny_trainer import PAIRS, make_trainer, weights
from torch.multiprocessing.reductions import StorageWeakRef
from training_run import make_run
from transformers import AutoModelForCausalLM

from sepo import SePOConfig, train
from sepo.data import pack
from sepo.errors import InputError
from sepo.masks import kinds, layer_states, load_mask

ADAM = dict(method="sparsepo", optim="adamw_torch", warmup_steps=0, learning_rate=0.01)


def mask_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.mask.named_parameters()}


def lora():
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("independent", [False, True])
def test_every_parameter_of_the_mask_trains(tmp_path, adapters, independent):
    trainer = make_trainer(
        tmp_path, independent_masks=independent, peft_config=lora() if adapters else None,
        num_train_epochs=2, **ADAM,
    )  # fmt: skip
    with torch.no_grad():  # at its initial size a tiny mask may be shut for all tokens
        for name, p in trainer.mask.named_parameters():
            p.copy_(torch.randn_like(p).abs() if "norm" not in name else p)
    before = mask_of(trainer)
    trainer.train()
    assert len(before) == (10 if independent else 5)
    for name, found in mask_of(trainer).items():
        assert not torch.equal(found, before[name]), name


def test_the_layers_are_let_go_of_before_backward_is_in_the_trunk(tmp_path, monkeypatch):
    """All of them weigh what a step's other activations do, and its peak lies there."""
    kept, gone = [], []

    def read(*args):
        hidden, states = layer_states(*args)
        kept.append(StorageWeakRef(states.untyped_storage()))
        return hidden, states

    monkeypatch.setattr(kinds, "layer_states", read)
    trainer = make_trainer(tmp_path, max_steps=1, **ADAM)
    norm = trainer.model.get_decoder().norm
    norm.register_full_backward_pre_hook(lambda *_: gone.append(kept[-1].expired()))
    trainer.train()
    assert gone and all(gone)


def test_the_mask_has_a_rate_and_a_decay_of_its_own(tmp_path):
    trainer = make_trainer(
        tmp_path, mask_learning_rate=0.25, mask_weight_decay=0.125, weight_decay=0.5, **ADAM
    )
    groups = trainer.create_optimizer().param_groups
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    found = [
        ({names[id(p)] for p in group["params"]}, group["lr"], group["weight_decay"])
        for group in groups
    ]
    mask = lambda *ends: {f"sparse_mask.reward.{end}" for end in ends}
    assert found[2:] == [
        (mask("weight", "mixer"), 0.25, 0.125),
        (mask("bias", "norm.weight", "norm.bias"), 0.25, 0.0),
    ]
    assert not any("sparse_mask" in name for group in found[:2] for name in group[0])
    assert sum(len(group[0]) for group in found) == len(names)
    assert [group["lr"] for group in groups[:2]] == [0.01, 0.01]


def test_it_is_saved_beside_the_model(tmp_path):
    trainer = make_trainer(tmp_path, independent_masks=True, **ADAM)
    trainer.train()
    trainer.save_model()
    for name, found in load_mask(tmp_path).named_parameters():
        assert torch.equal(found, mask_of(trainer)[name])
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "mask" in key]
    saved, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["unexpected_keys"] and not loading["missing_keys"]
    assert torch.equal(saved.lm_head.weight, trainer.model.lm_head.weight)
    assert trainer.model.sparse_mask is trainer.mask  # back in its place


def test_a_resumed_mask_goes_on(tmp_path):
    args = dict(save_strategy="steps", save_steps=1, **ADAM)
    whole, resumed = (make_trainer(tmp_path / name, **args) for name in ("whole", "resumed"))
    whole.train()
    (tmp_path / "resumed").mkdir(exist_ok=True)
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "resumed" / "checkpoint-2")
    resumed.train(resume_from_checkpoint=True)
    assert whole.state.global_step == resumed.state.global_step == 3
    for name, expected in weights(whole).items():
        assert torch.equal(weights(resumed)[name], expected), name


def test_the_seed_decides_the_mask_and_the_policy_does_not(tmp_path):
    first, same, other = (
        make_trainer(tmp_path, model=tiny_model(seed=i), seed=seed, **ADAM)
        for i, seed in enumerate((3, 3, 4))
    )
    at = "reward.weight"
    assert torch.equal(mask_of(first)[at], mask_of(same)[at])
    assert not torch.equal(mask_of(first)[at], mask_of(other)[at])


def test_what_is_logged_is_the_mask(tmp_path):
    trainer = make_trainer(tmp_path, pairs_per_step=len(PAIRS), independent_masks=True, **ADAM)
    batch = pack([trainer.train_pairs[i] for i in range(len(PAIRS))])
    with torch.no_grad():
        for mask, sign in ((trainer.mask.reward, 1.0), (trainer.mask.kl, -1.0)):
            mask.weight.normal_()  # as drawn, one of the two is shut for all tokens
            mask.mixer.copy_(sign * torch.tensor([1.0, -0.7]))
        _, states = layer_states(trainer.reference.model, batch)
        expected = dict(zip(("reward", "kl"), trainer.mask(states), strict=True))
    trainer.train()
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    for name, mask in expected.items():
        assert 0 < (mask == 0).sum() < len(mask), "the case says something"
        assert line[f"mask/{name}/sparsity"] == pytest.approx((mask == 0).float().mean().item())
        assert line[f"mask/{name}/density"] == pytest.approx((mask > 0).float().mean().item())
        assert line[f"mask/{name}/mean"] == pytest.approx(mask.mean().item(), rel=1e-5)


@pytest.mark.parametrize("shut", ["reward", "kl", None])
def test_a_mask_that_is_shut_for_good_is_told(tmp_path, shut, caplog):
    trainer = make_trainer(tmp_path, independent_masks=True, mask_l1=0.0, **ADAM)
    with torch.no_grad():
        for name, mask in trainer.mask.named_children():
            mask.weight.normal_()
            mask.mixer.fill_(-1.0 if name == shut else 1.0)
    trainer.train()
    told = [r.message for r in caplog.records if "is 0 for every token" in r.message]
    assert [m.split(" mask is")[0] for m in told] == ([f"the {shut}"] if shut else [])


def test_the_random_mask_has_no_parameters(tmp_path):
    trainer = make_trainer(tmp_path, mask_kind="random", **ADAM)
    assert trainer.mask is None
    trainer.train()
    logged = trainer.state.log_history[0]
    assert 0.3 < logged["mask/reward/mean"] < 0.7 and logged["mask/reward/sparsity"] == 0


def test_one_random_mask_or_two_learned(tmp_path):
    with pytest.raises(InputError, match="--independent_masks false, got true"):
        SePOConfig(
            output_dir=str(tmp_path), use_cpu=True, method="sparsepo", mask_kind="random",
            independent_masks=True,
        )  # fmt: skip


def test_by_the_script(tmp_path):
    """A reference by path; model, mask and log lie where the flags say."""
    arguments = make_run(tmp_path, method="sparsepo", save_strategy="no")
    tiny_model(seed=1).save_pretrained(tmp_path / "reference")
    out = tmp_path / "out"
    train.main([
        *arguments, "--output_dir", str(out), "--reference",
        str(tmp_path / "reference"), "--mask", "binary",
    ])  # fmt: skip
    assert load_mask(out).settings["binary"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["kl"] > 0 and lines[0]["mask/reward/mean"] == lines[0]["mask/reward/density"]


def test_an_empty_batch_gives_every_parameter_a_zero(tmp_path):
    trainer = make_trainer(tmp_path, pairs=random_scored_pairs(2), independent_masks=True, **ADAM)
    batch = pack([])
    tokens = trainer.model(batch=batch, reads=trainer._reads)
    losses = trainer._losses(tokens, batch, trainer._means)
    losses.sum().backward()
    for name, p in trainer.model.named_parameters():
        assert p.grad is not None and not p.grad.any(), name
