"""sepo.patch and its examples give other people's loops the loss and gradients of dense code."""

import json
from dataclasses import replace
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from tiny import random_scored_pairs, tiny_model, tiny_tokenizer
from training_run import write_store
from transformers import AutoModelForCausalLM, TrainingArguments

from examples.drop_in import minus_100, plain_loop
from sepo import ops, patch
from sepo.data import select_positions
from sepo.errors import InputError

Dataset = pytest.importorskip("datasets").Dataset
transformers_trainer = import_module("examples.drop_in.transformers_trainer")  # needs datasets
GAMMA, MARGIN = 2.0, 0.5
PAIRS = random_scored_pairs(6)
QUIET = dict(use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no")


def dense_loss(model, pairs, fraction: float = 0.3) -> torch.Tensor:  # (P,)
    """SePO from all logits of whole, unpadded sequences; no code of the examples."""
    losses = []
    for pair in pairs:
        mean = {}
        for side, best in (("chosen", "highest"), ("rejected", "lowest")):
            response = torch.from_numpy(getattr(pair, side)).long()
            logp = dense_logp(model, pair.prompt, response)
            score = getattr(pair, f"{side}_score")
            mean[side] = logp[select_positions(score, fraction, best).tolist()].mean()
        losses.append(-F.logsigmoid(GAMMA * (mean["chosen"] - mean["rejected"]) - MARGIN))
    return torch.stack(losses)


def dense_logp(model, prompt, response: torch.Tensor) -> torch.Tensor:  # (T,)
    ids = torch.cat([torch.from_numpy(prompt).long(), response])
    logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, response[:, None])[:, 0]


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def assert_same_step(model, loss, expected, *, rtol=1e-9):
    """Two losses of one model, and the gradients of all its parameters."""
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=0)
    loss.backward()
    ours = gradients(model)
    expected.backward()
    theirs = gradients(model)
    size = max(g.abs().max() for g in theirs.values())
    assert size > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * size.item())


def batch_of(pairs, **how) -> dict[str, torch.Tensor]:
    return patch.collate_pairs(list(patch.labelled_pairs(pairs, **how)))


@pytest.mark.parametrize("arch", ["llama", "gpt_neox"])
def test_the_plain_loop(arch):
    model = tiny_model(arch, dtype=torch.float64)
    with patch.transformers(model):
        loss = plain_loop.pair_loss(model, batch_of(PAIRS), gamma=GAMMA, margin=MARGIN)
    assert_same_step(model, loss, dense_loss(model, PAIRS).mean())


def test_the_plain_loop_on_capped_logits():
    model = tiny_model("gemma2", final_logit_softcapping=2.0)  # its attention is float32 anyway
    with patch.transformers(model):
        loss = plain_loop.pair_loss(model, batch_of(PAIRS), gamma=GAMMA, margin=MARGIN)
    assert_same_step(model, loss, dense_loss(model, PAIRS).mean(), rtol=1e-4)


def test_the_plain_loop_learns():
    model, batch = tiny_model(), batch_of(PAIRS)
    losses = plain_loop.train(model, [batch] * 8, learning_rate=1e-2)
    assert losses[-1] < 0.5 * losses[0]


def test_labels_are_where_the_tokens_are():
    """Every selected token, nothing else, and not a token after the last."""
    for pair, row in zip(PAIRS, patch.labelled_pairs(PAIRS, 0.5), strict=True):
        for side, best in (("chosen", "highest"), ("rejected", "lowest")):
            ids, labels = (torch.tensor(row[side][name]) for name in ("input_ids", "labels"))
            positions = select_positions(getattr(pair, f"{side}_score"), 0.5, best)
            where = len(pair.prompt) + positions
            assert (labels != -100).nonzero().flatten().tolist() == where.tolist()
            assert labels[where].tolist() == getattr(pair, side)[positions].tolist()
            assert len(ids) == len(labels) == where[-1] + 1
            whole = [*pair.prompt, *getattr(pair, side)]
            assert ids.tolist() == whole[: len(ids)]


def test_labels_from_the_command_line(tmp_path):
    write_store(tmp_path / "scored", PAIRS)
    out = tmp_path / "selected.jsonl"
    minus_100.main([str(tmp_path / "scored"), "--fraction", "0.5", "--output", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == list(patch.labelled_pairs(PAIRS, 0.5))
    # any SFT code: the model's own loss over the labels
    model, row = tiny_model(dtype=torch.float64), rows[0]["chosen"]
    ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
    positions = select_positions(PAIRS[0].chosen_score, 0.5, "highest")
    logp = dense_logp(model, PAIRS[0].prompt, torch.from_numpy(PAIRS[0].chosen).long())
    own = model(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(own.double(), -logp[positions.tolist()].mean(), rtol=1e-6, atol=0)


def test_a_store_without_scores_is_refused(tmp_path):
    write_store(tmp_path / "cached", [replace(p, chosen_score=None) for p in PAIRS], keep=["logp"])
    with pytest.raises(InputError, match="pair 0: expected a score per chosen token"):
        minus_100.main([str(tmp_path / "cached"), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


class Wrapped(torch.nn.Module):
    """What DDP, FSDP2 and ZeRO do: something before and after the module's forward."""

    def __init__(self, module):
        super().__init__()
        self.module, self.inside = module, False

    def forward(self, *args, **kwargs):
        self.inside = True
        try:
            return self.module(*args, **kwargs)
        finally:
            self.inside = False


def test_the_head_is_read_inside_the_forward(monkeypatch):
    model = tiny_model(dtype=torch.float64)
    own = model(input_ids=torch.arange(4)[None]).logits
    patch.transformers(model)
    wrapped, seen = Wrapped(model), []
    called = ops.selected_logprob
    spy = lambda *args, **kwargs: seen.append(wrapped.inside) or called(*args, **kwargs)
    monkeypatch.setattr(ops, "selected_logprob", spy)
    batch = batch_of(PAIRS)
    logp, cu_rows = wrapped(selected_labels=batch.pop("labels"), **batch)
    assert seen == [True]
    score = ops.segment_mean(logp, cu_rows)
    loss = ops.sepo_loss(score, gamma=GAMMA, margin=MARGIN)
    torch.testing.assert_close(loss, dense_loss(model, PAIRS), rtol=1e-9, atol=0)
    assert torch.equal(model(input_ids=torch.arange(4)[None]).logits, own)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21's
def test_the_model_may_have_adapters():
    from peft import LoraConfig, get_peft_model

    model = tiny_model("qwen2", dtype=torch.float64)
    # adapters that begin as zeros would hide that they are passed by
    config = LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    patch.transformers(adapted)
    batch = batch_of(PAIRS)
    logp, cu_rows = adapted(selected_labels=batch.pop("labels"), **batch)
    loss = ops.sepo_loss(ops.segment_mean(logp, cu_rows), gamma=GAMMA, margin=MARGIN)
    torch.testing.assert_close(loss, dense_loss(adapted, PAIRS), rtol=1e-9, atol=0)
    with adapted.disable_adapter():
        assert (loss - dense_loss(adapted, PAIRS)).abs().max() > 1e-3


def test_under_autocast_the_head_computes_in_bfloat16(monkeypatch):
    model, seen, called = tiny_model(), [], ops.selected_logprob
    patch.transformers(model)
    spy = lambda hidden, weight, *args, **kwargs: (
        seen.append({hidden.dtype, weight.dtype}) or called(hidden, weight, *args, **kwargs)
    )
    monkeypatch.setattr(ops, "selected_logprob", spy)
    batch = batch_of(PAIRS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp, _ = model(selected_labels=batch.pop("labels"), **batch)
    assert seen == [{torch.bfloat16}] and logp.dtype == torch.float32


@pytest.mark.parametrize("accumulation", [1, 3])
def test_transformers_trainer(tmp_path, accumulation):
    """A step of Trainer's own loop moves the weights along the dense gradient of all its pairs."""
    model = tiny_model(dtype=torch.float64)
    expected = dense_loss(model, PAIRS).mean()
    expected.backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    theirs = gradients(model)
    trainer = patch.PairTrainer(
        model,
        TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=len(PAIRS) // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            learning_rate=1.0,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0,
            remove_unused_columns=False,
            **QUIET,
        ),
        train_dataset=Dataset.from_list(list(patch.labelled_pairs(PAIRS))),
        data_collator=patch.collate_pairs,
    )
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(expected.item())
    assert trainer.train().training_loss == pytest.approx(expected.item(), rel=1e-6)
    steps = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    size = max(g.abs().max() for g in theirs.values()).item()
    torch.testing.assert_close(steps, theirs, rtol=1e-8, atol=1e-9 * size)


def test_the_example_for_transformers_runs(tmp_path):
    """From a scored store to a trained model, as the two command lines do it."""
    tiny_model().save_pretrained(tmp_path / "M")
    write_store(tmp_path / "scored", PAIRS)
    rows, policy = str(tmp_path / "selected.jsonl"), str(tmp_path / "policy")
    minus_100.main([str(tmp_path / "scored"), "--output", rows])
    how = dict(learning_rate=1e-2, per_device_train_batch_size=3, num_train_epochs=3, **QUIET)
    transformers_trainer.train(str(tmp_path / "M"), rows, policy, **how)
    trained = AutoModelForCausalLM.from_pretrained(policy).eval()
    before = dense_loss(tiny_model(), PAIRS).mean()
    assert dense_loss(trained, PAIRS).mean() < 0.8 * before


@pytest.fixture
def trl_dpo(monkeypatch):
    """The example for TRL, or nothing where TRL isn't installed."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    pytest.importorskip("trl")
    from examples.drop_in import trl_dpo

    return trl_dpo


def trl_arguments(path, **more):
    from trl import DPOConfig

    options = dict(bf16=False, gradient_checkpointing=False, remove_unused_columns=False)
    return DPOConfig(str(path), beta=0.1, **options, **QUIET, **more)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning")
def test_trl_with_our_head_is_trl(trl_dpo, tmp_path):
    """The same loss and gradients as DPOTrainer's own compute_loss, on TRL's own batch."""
    from trl import DPOTrainer

    model, reference, tokenizer = tiny_model(), tiny_model(seed=1), tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    rows = [
        {"prompt": "w3 w4", "chosen": "w5 w6 w7", "rejected": "w8"},
        {"prompt": "w9", "chosen": "w2", "rejected": "w11 w12 w13 w3"},
    ]
    trainer = patch.HeadDPOTrainer(
        model,
        ref_model=reference,
        args=trl_arguments(tmp_path),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    model.eval()
    ours = trainer.compute_loss(model, batch)
    assert_same_step(model, ours, DPOTrainer.compute_loss(trainer, model, batch), rtol=1e-4)
    margins = trainer._metrics["eval"]["rewards/margins"]  # ours, TRL's
    assert margins[0] == pytest.approx(margins[1], rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning")
def test_trl_trains_selected_tokens(trl_dpo, tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    expected = dense_loss(model, PAIRS).mean()
    trainer = patch.SelectedDPOTrainer(
        model,
        args=trl_arguments(tmp_path, precompute_ref_log_probs=True, learning_rate=1e-2),
        train_dataset=Dataset.from_list(list(patch.masked_pairs(PAIRS))),
        processing_class=tokenizer,
        data_collator=patch.MaskedPreferenceCollator(pad_token_id=1),
    )
    assert trainer.ref_model is None
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(PAIRS))])
    model.eval()
    assert_same_step(model, trainer.compute_loss(model, batch), expected, rtol=1e-4)
    trainer.train()
    with torch.no_grad():
        assert dense_loss(model.eval(), PAIRS).mean() < 0.8 * expected


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning")
def test_the_example_for_trl_runs(trl_dpo, tmp_path):
    tiny_model().save_pretrained(tmp_path / "M")
    tiny_tokenizer().save_pretrained(tmp_path / "M")
    write_store(tmp_path / "scored", PAIRS)
    how = dict(learning_rate=1e-2, per_device_train_batch_size=3, num_train_epochs=3, bf16=False)
    names = (str(tmp_path / name) for name in ("M", "scored", "policy"))
    trl_dpo.train(*names, gradient_checkpointing=False, **how, **QUIET)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    before = dense_loss(tiny_model(), PAIRS).mean()
    assert dense_loss(trained, PAIRS).mean() < 0.8 * before
