"""Rules in training: chosen anew at every step, logged, resumed to the bit, beside adapters."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from dense import dense_losses
from method_losses import arguments
from tiny import random_scored_pairs, tiny_model
from tiny_trainer import LONGEST, PAIRS, bare, make_trainer, weights

from sepo import SePOConfig
from sepo.data import pack
from sepo.errors import InputError
from sepo.trainer.methods import METHODS

RULES = sorted(name for name, method in METHODS.items() if method.rule is not None)
WHOLE = dict(pairs_per_step=len(PAIRS), warmup_steps=0, lr_scheduler_type="constant")


def lines_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def lora():
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")


@pytest.mark.parametrize("budget", [LONGEST, None])
@pytest.mark.parametrize("method", RULES)
def test_two_steps_descend_the_dense_loss(tmp_path, method, budget):
    """The second step's tokens are chosen by the policy that the first one left."""
    args = arguments(method)
    options = {name: getattr(args, name) for name in args_of(method)}
    trainer = make_trainer(
        tmp_path, dtype=torch.float64, method=method, num_train_epochs=2, eval_pairs=None,
        max_tokens_per_batch=budget, **WHOLE, **options,
    )  # fmt: skip
    trainer.train()
    model, losses = tiny_model(dtype=torch.float64), []
    for _ in range(2):
        loss = dense_losses(model, None, PAIRS, args).mean()
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.05 * p.grad
    for name, expected in model.named_parameters():
        torch.testing.assert_close(weights(trainer)[name], expected, rtol=0, atol=1e-9)
    found = [line["loss"] for line in lines_of(tmp_path)]
    assert found == pytest.approx(losses, abs=1e-5)


def args_of(method):
    return ("seed", *METHODS[method].settings)


@pytest.mark.parametrize("method", RULES)
def test_a_resumed_run_goes_on_to_the_bit(tmp_path, method):
    args = dict(
        save_strategy="steps", save_steps=1, optim="adamw_torch", warmup_steps=0, method=method,
        max_tokens_per_batch=2 * LONGEST, logging_steps=2,
    )  # fmt: skip
    whole, resumed = (make_trainer(tmp_path / name, **args) for name in ("whole", "resumed"))
    whole.train()
    (tmp_path / "resumed").mkdir(exist_ok=True)
    (tmp_path / "whole" / "checkpoint-1").rename(tmp_path / "resumed" / "checkpoint-1")
    resumed.train(resume_from_checkpoint=True)
    assert whole.state.global_step == resumed.state.global_step == 3
    for name, expected in weights(whole).items():
        assert torch.equal(weights(resumed)[name], expected), name
    of_the_rule = lambda folder: [
        (line["selection/density"], line["selection/empty"]) for line in lines_of(tmp_path / folder)
    ]
    assert of_the_rule("whole") == of_the_rule("resumed")


@pytest.mark.parametrize("method", RULES)
def test_what_is_logged_is_the_choice(tmp_path, method):
    trainer = make_trainer(tmp_path, method=method, **WHOLE)
    batch = pack([trainer.train_pairs[i] for i in range(len(PAIRS))])
    with torch.no_grad():
        keep = trainer.model(batch=batch, reads=trainer._reads).keep
    per_response = [part.sum() for part in keep.split(batch.cu_rows.diff().tolist())]
    empty = [0 in pair for pair in zip(per_response[::2], per_response[1::2], strict=True)]
    trainer.train()
    (line,) = lines_of(tmp_path)
    assert line["selection/density"] == pytest.approx(keep.double().mean().item())
    assert line["selection/empty"] == pytest.approx(np.mean(empty))
    assert 0 < line["selection/density"] < 1
    assert (line["selection/empty"] > 0) == (method == "confpo")
    assert line["tokens/selected"] == sum(len(p.chosen) + len(p.rejected) for p in PAIRS)


def test_a_pair_with_an_empty_side_counts_as_zero(tmp_path):
    """It leaves the loss, as released: the mean is over all pairs of the step."""
    short = replace(PAIRS[0], id="short", chosen=np.array([7], np.int32), chosen_ref_logp=None)
    of = lambda pairs: make_trainer(
        tmp_path, method="confpo", pairs=pairs, eval_pairs=None, dtype=torch.float64, **WHOLE
    )
    longer = [p for p in bare(PAIRS) if min(len(p.chosen), len(p.rejected)) > 1][:3]
    alone, beside = of(longer).evaluate(longer), of(longer).evaluate([*longer, *bare([short])])
    assert alone["eval_selection/empty"] == 0 and beside["eval_selection/empty"] == 0.25
    assert beside["eval_loss"] == pytest.approx(alone["eval_loss"] * 3 / 4, rel=1e-12)


# peft 0.21 asks transformers 5.23 by an old name
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_selective_dpo_starts_with_all_tokens_and_few_later(tmp_path):
    """With LoRA the reference is the policy without adapters: the same route, differences of 0."""
    trainer = make_trainer(
        tmp_path, method="selective-dpo", pairs=bare(PAIRS), eval_pairs=None, peft_config=lora(),
        num_train_epochs=2, **WHOLE | dict(learning_rate=1.0),
    )  # fmt: skip
    trainer.train()
    first, second = lines_of(tmp_path)
    assert first["selection/density"] == 1 and first["loss"] == pytest.approx(np.log(2))
    K = lambda T: T - -(-6 * (T - 1) // 10)
    lengths = [len(y) for p in PAIRS for y in (p.chosen, p.rejected)]
    expected = sum(map(K, lengths)) / sum(lengths)
    assert second["selection/density"] == pytest.approx(expected)


@pytest.mark.parametrize("method", RULES)
def test_an_empty_batch_gives_every_parameter_a_zero(tmp_path, method):
    trainer = make_trainer(tmp_path, pairs=random_scored_pairs(2), method=method)
    tokens = trainer.model(batch=pack([]), reads=trainer._reads)
    trainer._losses(tokens, pack([]), trainer._means).sum().backward()
    for name, p in trainer.model.named_parameters():
        assert p.grad is not None and not p.grad.any(), name


@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_a_quantile_that_is_none(value):
    with pytest.raises(InputError, match=r"--selection_quantile: expected a number in \[0, 1\]"):
        SePOConfig(output_dir="-", use_cpu=True, selection_quantile=value)
