"""Fields that change what a run logs, evaluates, saves and sends: what shows that they do."""

import inspect
import logging
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from served_fields import THEIRS, checkpoints, logged, read_by, shows, steps_with
from tiny_trainer import PAIRS, weights
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

from sepo.flags import packages


@shows("logging_strategy", "logging_steps", "logging_first_step")
def _(run):
    assert steps_with(run(), "loss") == [1, 2, 3]
    assert steps_with(run(logging_steps=2), "loss") == [2]
    assert steps_with(run(logging_steps=2, logging_first_step=True), "loss") == [1, 2]
    assert steps_with(run(logging_strategy="epoch"), "loss") == [3]
    assert steps_with(run(logging_strategy="no"), "loss") == []


@shows("include_num_input_tokens_seen")
def _(run):
    done = run(include_num_input_tokens_seen=True)
    read = torch.tensor(logged(done, "tokens/read")).cumsum(0).tolist()
    assert logged(done, "num_input_tokens_seen")[:3] == read


@shows("log_level", "log_level_replica")
def _(run, name):
    before = transformers.logging.get_verbosity()
    try:
        run.make(log_level="error")
        assert transformers.logging.get_verbosity() == logging.ERROR
    finally:
        transformers.logging.set_verbosity(before)
    read_by(TrainingArguments.get_process_log_level, name=name)


@shows("log_on_each_node")
def _(name):
    read_by(TrainingArguments.should_log, name=name)


@shows("save_on_each_node")
def _(name):
    read_by(TrainingArguments.should_save, name=name)


@shows("disable_tqdm")
def _(run):
    bars = lambda off: any(
        "Progress" in type(c).__name__
        for c in run.make(disable_tqdm=off).callback_handler.callbacks
    )
    assert (bars(True), bars(False)) == (False, True)


class Tracker(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append((args.run_name, state.global_step))


@shows("report_to", "run_name")
def _(run, monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Tracker)
    monkeypatch.setattr(packages, "get_available_reporting_integrations", lambda: ["wandb"])
    done = run(report_to="wandb", run_name="first")
    (tracker,) = (c for c in done.callback_handler.callbacks if isinstance(c, Tracker))
    assert tracker.seen[:3] == [("first", 1), ("first", 2), ("first", 3)]


@shows("project", *[name for name in THEIRS if name.startswith("trackio_")])
def _(name):
    assert f"args.{name}" in inspect.getsource(integration_utils.TrackioCallback)


@shows("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "do_eval")
def _(run):
    at = lambda **args: steps_with(run(**args), "eval_loss")
    assert at() == []
    assert at(eval_strategy="epoch", num_train_epochs=2) == [3, 6]
    assert at(eval_strategy="steps") == [1, 2, 3]  # logging_steps
    assert at(eval_strategy="steps", eval_steps=2) == [2, 3]  # and at the end
    assert at(eval_strategy="steps", eval_delay=2) == [2, 3]
    assert at(eval_on_start=True) == [0]


@shows("save_strategy", "save_steps", "save_total_limit", "save_only_model")
def _(run):
    assert checkpoints(run(save_strategy="epoch")) == ["checkpoint-3"]
    assert checkpoints(run(save_strategy="steps", save_steps=2)) == ["checkpoint-2", "checkpoint-3"]
    limited = run(save_strategy="steps", save_steps=1, save_total_limit=1, save_only_model=True)
    assert checkpoints(limited) == ["checkpoint-3"]
    names = {p.name for p in (Path(limited.args.output_dir) / "checkpoint-3").iterdir()}
    assert "model.safetensors" in names and "optimizer.pt" not in names


@shows("load_best_model_at_end", "metric_for_best_model", "greater_is_better")
def _(run):
    evaluated = dict(eval_strategy="steps", save_strategy="steps", save_steps=1)
    for metric, better in (("loss", None), ("eval_rewards/margins", True), ("loss", True)):
        done = run(
            **evaluated, load_best_model_at_end=True, metric_for_best_model=metric,
            greater_is_better=better, num_train_epochs=2,
        )  # fmt: skip
        values = logged(done, f"eval_{metric.removeprefix('eval_')}")
        best = values.index((max if better else min)(values)) + 1
        folder = Path(done.args.output_dir) / f"checkpoint-{best}"
        assert done.state.best_model_checkpoint == str(folder)
        saved = type(done.model).from_pretrained(folder).state_dict()
        for name, weight in weights(done).items():
            assert torch.equal(weight, saved[name])


@shows("restore_callback_states_from_checkpoint")
def _(run):
    args = dict(eval_strategy="steps", save_strategy="steps", save_steps=1)
    args |= dict(metric_for_best_model="loss", load_best_model_at_end=True)
    first = run.make(**args, max_steps=2)
    first.add_callback(EarlyStoppingCallback(early_stopping_patience=7))
    first.train()
    for restores, patience in ((True, 7), (False, 5)):
        again = run.make(**args, max_steps=3, restore_callback_states_from_checkpoint=restores)
        again.add_callback(EarlyStoppingCallback(early_stopping_patience=5))
        again.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-1")
        (found,) = (
            c for c in again.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)
        )
        assert found.early_stopping_patience == patience


class Hub:
    """Stands for the hub: remembers what was asked of it."""

    def __init__(self):
        self.created, self.uploaded = [], []

    def create_repo(self, name, **how):
        self.created.append((name, how["token"], how["private"]))
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, **how):
        self.uploaded.append((how["repo_id"], how["revision"], how["commit_message"]))
        return SimpleNamespace(done=lambda: True)


HUB = ("push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "hub_revision")


@shows(*HUB, "hub_strategy", "hub_always_push")
def _(run, monkeypatch):
    hub = Hub()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    args = dict(save_strategy="steps", save_steps=2, push_to_hub=True, hub_model_id="me/mine")
    args |= dict(hub_token="secret", hub_private_repo=True, hub_revision="try", report_to="none")
    run(**args, hub_always_push=True)
    assert hub.created == [("me/mine", "secret", True)]
    step = "Training in progress, step"
    assert hub.uploaded == [("me/mine", "try", f"{step} 2"), ("me/mine", "try", f"{step} 3")]
    hub.uploaded.clear()
    run(**args, hub_strategy="end")
    assert hub.uploaded == []


@shows("skip_memory_metrics")
def _(run):
    made = run.make(skip_memory_metrics=False)
    assert "train_mem_cpu_alloc_delta" in made.train().metrics
    assert "eval_mem_cpu_alloc_delta" in made.evaluate(PAIRS[:3])
    assert not any("mem_cpu" in key for key in run.make().train().metrics)
