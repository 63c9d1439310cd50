"""A step that is not finite ends the run by name, and nothing broken is saved."""

import json
import math
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from processes import exit_line, run_jobs
from tiny import V, random_scored_pairs
from tiny_trainer import LONGEST, PAIRS, make_trainer
from training_run import make_run, write_store

from sepo.errors import InputError
from sepo.system.lock import lock
from sepo.trainer.checkpoints import last_checkpoint
from sepo.trainer.methods import METHODS
from sepo.trainer.metrics import MetricsFile

STEPS = dict(save_strategy="steps", save_steps=1, optim="adamw_torch", max_grad_norm=1.0)
SIDES = ("chosen", "rejected")
TOKEN = V - 1  # of the poisoned rows alone


def lines_of(path):
    refuse = lambda literal: pytest.fail(f"{literal} is no JSON")
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def poisoned(rows):
    """Pairs of which some have a token that no other has."""
    other = lambda ids: np.where(ids == TOKEN, 1, ids).astype(np.int32)
    pairs = [
        replace(p, prompt=other(p.prompt), chosen=other(p.chosen), rejected=other(p.rejected))
        for p in PAIRS
    ]
    for row in rows:
        pairs[row] = replace(pairs[row], prompt=np.array([3, TOKEN], np.int32))
    return pairs


def plans_of(trainer):
    size = trainer.args.pairs_per_step
    steps = range(-(-len(PAIRS) // size))
    return [trainer._plan(trainer.train_pairs, size, step=s).pairs.tolist() for s in steps]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_step_and_rows_are_named(tmp_path, method):
    """Exactly the rows whose loss is not finite, of the step that has the first of them."""
    make = lambda pairs: make_trainer(
        tmp_path, arch="qwen2", pairs=pairs, eval_pairs=None, method=method,
        max_tokens_per_batch=2 * LONGEST,
    )  # fmt: skip
    plans = plans_of(make(poisoned([])))
    pairs = poisoned([plans[1][0], plans[1][3], plans[2][1]])
    trainer = make(pairs)
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[TOKEN] = torch.nan
    with pytest.raises(InputError, match="step 2: .*got the loss of pair") as error:
        trainer.train()
    named = {row for row in plans[1] if f" {pairs[row].id} (nan)" in str(error.value)}
    assert named == {plans[1][0], plans[1][3]} and str(error.value).count("(nan)") == 2
    assert [line["step"] for line in lines_of(tmp_path / "metrics.jsonl")] == [1]


def test_the_last_good_checkpoint_is_kept(tmp_path):
    row = 4
    pairs = [*PAIRS[:row], replace(PAIRS[row], chosen_ref_logp=PAIRS[row].chosen_ref_logp * np.nan)]
    pairs += PAIRS[row + 1 :]
    trainer = make_trainer(
        tmp_path, pairs=pairs, eval_pairs=None, method="dpo", pairs_per_step=1, **STEPS
    )
    step = plans_of(trainer).index([row]) + 1
    assert step > 1
    message = f"step {step}: .*pair {row} .nan.; .*checkpoint-{step - 1} is whole"
    with pytest.raises(InputError, match=message):
        trainer.train()
    assert last_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{step - 1}")
    assert not list(tmp_path.glob("*.safetensors"))
    assert len(lines_of(tmp_path / "metrics.jsonl")) == step - 1


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite(tmp_path, value, clip):
    """The loss is; after the optimiser's step the weights would not be."""
    trainer = make_trainer(tmp_path, **STEPS | dict(max_grad_norm=clip, warmup_steps=0))
    before = trainer.model.model.norm.weight.clone()
    trainer.model.model.norm.weight.register_hook(
        lambda grad: grad * value if trainer.state.global_step == 1 else None
    )
    with pytest.raises(InputError, match=r"step 2: .* gradient \(norm (inf|nan)\) and loss") as e:
        trainer.train()
    rows = ", ".join(map(str, plans_of(trainer)[1]))
    assert f"of pair {rows};" in str(e.value)
    assert trainer.model.model.norm.weight.isfinite().all()
    assert not torch.equal(trainer.model.model.norm.weight, before)
    assert last_checkpoint(tmp_path).endswith("checkpoint-1")


def test_float16s_scaler_may_meet_infinity(tmp_path, monkeypatch):
    """It skips such a step itself, and tries a smaller scale."""
    trainer = make_trainer(tmp_path)
    trainer._step_loss, infinite = torch.tensor(1.0), torch.tensor(torch.inf)
    monkeypatch.setattr(trainer.accelerator, "scaler", object())
    assert trainer._get_grad_norm(trainer.model, infinite) is infinite
    trainer._step_loss, trainer._pair_losses = infinite, [([3], torch.tensor([torch.inf]))]
    with pytest.raises(InputError, match=r"step 1: .*pair 3 \(inf\)"):
        trainer._get_grad_norm(trainer.model, infinite)


@pytest.mark.parametrize("save", ["steps", "no"])
def test_weights_that_the_optimiser_broke_are_not_saved(tmp_path, save):
    """Loss and gradient of the last step were finite."""
    arguments = STEPS | dict(save_strategy=save, learning_rate=1e38, optim="sgd")
    arguments |= dict(warmup_steps=0, max_grad_norm=0.0)
    trainer = make_trainer(tmp_path, pairs_per_step=13, **arguments)
    trainer.model.model.norm.weight.register_hook(lambda grad: grad + 1e4)
    with pytest.raises(InputError, match="step 1: expected finite weights, got some in model"):
        trainer.train()
    with pytest.raises(InputError, match="no checkpoint was written before"):
        trainer.save_model()
    assert not list(tmp_path.rglob("*.safetensors")) and last_checkpoint(tmp_path) is None


def test_a_run_that_becomes_nan_exits_with_one_line(tmp_path):
    arguments = make_run(tmp_path, save_steps=100, learning_rate=1e30, warmup_steps=0)
    line = exit_line("-m", "sepo.train", *arguments, "--output_dir", tmp_path / "out")
    assert line.startswith("sepo: error: step ") and "expected" in line and "finite" in line
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.slow
def test_ranks_end_together_and_all_name_the_row(tmp_path):
    """Only one of them has it; and a folder that another process holds is refused on both."""
    arguments = make_run(tmp_path, save_steps=1)
    heavy = random_scored_pairs(12)
    weights = {f"{s}_weight": np.full(len(getattr(heavy[5], s)), 3e38, np.float32) for s in SIDES}
    heavy[5] = replace(heavy[5], **weights)  # times a log-probability: beyond float32
    write_store(tmp_path / "heavy", heavy)
    job = lambda name, *more: dict(
        argv=[*arguments, "--output_dir", str(tmp_path / name / "out"), *more], ranks=2, code=1
    )
    for name in ("row", "held"):
        (tmp_path / name).mkdir()
    with lock(tmp_path / "held" / "out"):
        run_jobs(tmp_path, [job("row", "--dataset_name", str(tmp_path / "heavy")), job("held")])
    errors = lambda name: [
        line
        for line in (tmp_path / name / "forks.log").read_text().splitlines()
        if line.startswith("sepo.errors.InputError: ")
    ]
    found = errors("row")
    assert len(found) == 2 and len(set(found)) == 1
    assert re.search(r"step \d: .*got the loss of pair 5 \((inf|nan)\);", found[0])
    assert not list((tmp_path / "row" / "out").glob("*.safetensors"))
    found = errors("held")
    assert len(found) == 2 and all(f"by process {os.getpid()} on" in line for line in found)


def test_a_step_waits_once_for_the_device(tmp_path, monkeypatch):
    """Where Trainer would have, for its own filter."""
    trainer = make_trainer(tmp_path, logging_steps=100, eval_pairs=None, max_grad_norm=1.0)
    waits = []
    for name in ("__bool__", "item", "tolist", "__float__"):
        original = getattr(torch.Tensor, name)

        def counting(tensor, *args, name=name, original=original):
            if trainer.state.global_step == 1 and trainer.model.training:
                waits.append(name)
            return original(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, counting)
    trainer.train()
    assert waits.count("__bool__") == 1 and set(waits) <= {"__bool__"}, waits


def test_metrics_are_json(tmp_path):
    """An evaluation may be infinite, though the training is not."""
    trainer = make_trainer(tmp_path, method="dpo")
    infinite = replace(PAIRS[0], chosen_ref_logp=PAIRS[0].chosen_ref_logp - np.inf)
    assert not math.isfinite(trainer.evaluate([infinite])["eval_rewards/margins"])
    (line,) = lines_of(tmp_path / "metrics.jsonl")
    assert line["eval_rewards/margins"] is None and math.isfinite(line["eval_logps/chosen"])


def test_what_is_not_finite_is_null(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    entry = dict(step=1, a=math.nan, b=math.inf, c=-math.inf, d=0.5, e=3, f="text", g=None)
    file.append(entry)
    file.rewrite([entry, entry])
    file.append(entry)
    found = dict(step=1, a=None, b=None, c=None, d=0.5, e=3, f="text", g=None)
    assert lines_of(file.path) == [found] * 3
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
