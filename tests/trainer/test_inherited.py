"""Each of transformers' TrainingArguments does what transformers documents, or is refused by name.

A field that the installed transformers has and the table has not fails the first test, and nothing
else. Fields that are served have an effect to show, below.
"""

import inspect
import logging
from dataclasses import MISSING, fields, replace
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny_trainer import PAIRS, make_trainer, weights
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainingArguments,
    trainer_optimizer,
)
from transformers.integrations import integration_utils

from sepo import SePOConfig
from sepo.errors import InputError
from sepo.flags import packages
from sepo.trainer import fused, trainer
from sepo.trainer.arguments import parse
from sepo.trainer.inherited import FIELDS, Decided, Needs, Refused
from sepo.trainer.trainer import SePOTrainer

THEIRS = {field.name: field for field in fields(TrainingArguments) if field.init}
TESTS = Path(__file__).parent
ELSEWHERE = {  # shown by another file's tests
    "deepspeed": "test_deepspeed.py",
    "fsdp": "test_distributed.py",
    "fsdp_config": "test_distributed.py",
    "resume_from_checkpoint": "test_resume.py",
    "torch_compile": "test_full_stretch.py",
    "use_liger_kernel": "test_full_stretch.py",
    "liger_kernel_config": "test_full_stretch.py",
}
ON_A_GPU = {"fp16": "--fp16: float16 is computed with on a GPU", "tf32": "--tf32 requires Ampere"}
EFFECTS = {}  # field -> what shows it
BASE = dict(output_dir="x", use_cpu=True)


def test_the_table_knows_every_field_of_this_transformers():
    new = sorted(THEIRS.keys() - FIELDS.keys())
    assert not new, f"transformers {transformers.__version__} has {new}: served, or refused why?"


def test_a_field_that_the_table_does_not_know_is_left_to_transformers(monkeypatch):
    monkeypatch.delitem(FIELDS, "dataloader_num_workers")
    assert SePOConfig(**BASE, dataloader_num_workers=2).dataloader_num_workers == 2


def of(kind: type) -> list[str]:
    return sorted(name for name in THEIRS if isinstance(FIELDS.get(name), kind))


def another(name: str):
    """A value that isn't the field's default."""
    verdict, field = FIELDS[name], SePOConfig.__dataclass_fields__[name]
    default = field.default if field.default_factory is MISSING else field.default_factory()
    if getattr(verdict, "values", None):
        return verdict.values[0]
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default + 1
    given = {
        "accelerator_config": {"split_batches": True},
        "include_for_metrics": ["inputs"],
        "label_names": ["labels"],
        "neftune_noise_alpha": 5.0,
        "dataloader_prefetch_factor": 2,
        "eval_accumulation_steps": 2,
        "dataloader_multiprocessing_context": "fork",
        "eval_steps": 2.0,
        "fsdp_config": {"version": 2},
        "optim_args": "momentum=0.5",
        "train_sampling_strategy": "group_by_length",
        "greater_is_better": True,
        "hub_private_repo": True,
        "liger_kernel_config": {"rope": True},
        "activation_checkpointing_kwargs": {"use_reentrant": False},
    }
    return given.get(name, "x" if not isinstance(default, Enum) else default)


@pytest.mark.parametrize("name", of(Refused))
def test_refused_by_name(name):
    with pytest.raises(InputError, match=f"^--{name} has no meaning here: "):
        SePOConfig(**BASE, **{name: another(name)})


@pytest.mark.parametrize("name", sorted({*of(Refused)} - {"parallelism_config"}))
def test_refused_on_the_command_line(name):
    value = another(name)
    value = value[0] if isinstance(value, list) else value
    words = [f"--{name}", '{"split_batches": true}' if isinstance(value, dict) else str(value)]
    needed = ["--model_name_or_path", "M", "--dataset_name", "D", "--output_dir", "O"]
    with pytest.raises(InputError, match=f"--{name} has no meaning here"):
        parse([*needed, "--use_cpu", *words])


def test_what_was_derived_is_not_taken_for_what_was_given():
    args = SePOConfig(**BASE, eval_strategy="steps", load_best_model_at_end=True, save_steps=1)
    assert replace(args, seed=3).seed == 3
    for key in ("hub_token",):  # to_dict hides it
        copied = SePOConfig(**{k: v for k, v in args.to_dict().items() if k != key})
    assert copied.to_dict() == args.to_dict()
    assert copied.first_token == "paper"


MET = {  # of each Needs, values that meet it
    "activation_checkpointing_kwargs": dict(gradient_checkpointing=True),
    "adam_beta1": dict(optim="adamw_torch"),
    "adam_beta2": dict(optim="adamw_torch"),
    "adam_epsilon": dict(optim="adamw_torch"),
    "do_eval": dict(eval_strategy="epoch"),
    "eval_delay": dict(eval_strategy="epoch"),
    "eval_steps": dict(eval_strategy="steps"),
    "fsdp_config": dict(fsdp=True),
    "greater_is_better": dict(save_strategy="best"),
    "liger_kernel_config": dict(fused_layers="liger"),
    "logging_steps": dict(logging_strategy="steps"),
    "metric_for_best_model": dict(load_best_model_at_end=True),
    "optim_args": dict(optim="sgd"),
    "optim_target_modules": dict(optim="galore_adamw"),
    "run_name": dict(report_to=["wandb"]),
    "save_steps": dict(save_strategy="steps"),
    "torch_compile_backend": dict(torch_compile=True),
    "torch_compile_mode": dict(torch_compile=True),
    **dict.fromkeys([n for n in THEIRS if n.startswith("hub_")], dict(push_to_hub=True)),
    **dict.fromkeys([n for n in THEIRS if "trackio" in n], dict(report_to=["trackio"])),
    "project": dict(report_to=["trackio"]),
}
UNMET = {  # where the defaults meet it
    **dict.fromkeys(["adam_beta1", "adam_beta2", "adam_epsilon"], dict(optim="sgd")),
    "logging_steps": dict(logging_strategy="no"),
    "save_steps": dict(save_strategy="no"),
}


@pytest.mark.parametrize("name", of(Needs))
def test_a_flag_that_does_nothing_says_so(name, caplog):
    value = {"logging_steps": 2.0, "save_steps": 2.0, "eval_delay": 1.0}.get(name, another(name))
    value = 0.5 if name.startswith("adam_") else value
    if name.startswith("torch_compile_"):  # given, it compiles
        assert SePOConfig(**BASE, torch_compile_backend="eager").torch_compile
        return
    args = SePOConfig(**BASE, **UNMET.get(name, {}), **{name: value})
    assert f"--{name} does nothing without {FIELDS[name].what}" in caplog.messages
    assert FIELDS[name].met(SimpleNamespace(**{**vars(args), **MET[name]}))


# What is served


def shows(*names: str):
    """Register what shows that the fields of these names do as transformers documents."""

    def register(check):
        EFFECTS.update(dict.fromkeys(names, check))
        return check

    return register


def test_every_field_has_a_verdict_that_a_test_shows():
    shown = EFFECTS.keys() | ELSEWHERE.keys() | ON_A_GPU.keys() | {*of(Refused), *of(Decided)}
    assert not THEIRS.keys() - shown
    for name, file in ELSEWHERE.items():
        assert name in (TESTS / file).read_text(), f"{file} says nothing of {name}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="then it is served")
@pytest.mark.parametrize("name", sorted(ON_A_GPU))
def test_what_needs_a_gpu_says_so(name):
    with pytest.raises(InputError, match=ON_A_GPU[name]):
        SePOConfig(**BASE, **{name: True})


class Run:
    """Train on 13 pairs, 5 a step: 3 steps an epoch."""

    def __init__(self, path: Path):
        self.path, self.count = path, 0

    def make(self, **args) -> SePOTrainer:
        self.count += 1
        return make_trainer(self.path / str(self.count), **args)

    def __call__(self, **args) -> SePOTrainer:
        made = self.make(**args)
        made.train()
        return made


def logged(done: SePOTrainer, what: str) -> list:
    return [entry[what] for entry in done.state.log_history if what in entry]


def steps_with(done: SePOTrainer, what: str) -> list[int]:
    return [entry["step"] for entry in done.state.log_history if what in entry]


def checkpoints(done: SePOTrainer) -> list[str]:
    return sorted(path.name for path in Path(done.args.output_dir).glob("checkpoint-*"))


def read_by(function, *, name: str) -> None:
    """The field is read by code of transformers that SePOTrainer leaves as it is."""
    function = getattr(function, "fget", function)  # of a property
    home = function.__qualname__.split(".")[0]
    ours = {"Trainer": SePOTrainer, "TrainingArguments": SePOConfig}.get(home)
    if ours is not None:
        found = inspect.getattr_static(ours, function.__name__)
        assert getattr(found, "func", getattr(found, "fget", found)) is function
    assert f".{name}" in inspect.getsource(function)


@shows("output_dir")
def _(run):
    done = run()
    assert (Path(done.args.output_dir) / "metrics.jsonl").exists()


@shows("num_train_epochs", "max_steps")
def _(run):
    assert run(num_train_epochs=2).state.global_step == 6
    assert run(num_train_epochs=2, max_steps=4).state.global_step == 4


@shows("learning_rate", "lr_scheduler_type", "warmup_steps", "lr_scheduler_kwargs")
def _(run):
    rates = lambda kind, **args: logged(
        run(learning_rate=0.03, lr_scheduler_type=kind, **args), "learning_rate"
    )
    assert rates("linear", warmup_steps=0) == pytest.approx([0.03, 0.02, 0.01])
    assert rates("constant_with_warmup", warmup_steps=3) == pytest.approx([0, 0.01, 0.02])
    floor = dict(warmup_steps=0, lr_scheduler_kwargs={"min_lr_rate": 1.0})
    assert rates("cosine_with_min_lr", **floor) == pytest.approx([0.03] * 3)


@shows("optim", "optim_args")
def _(run):
    optimizer = run(optim="sgd", optim_args="momentum=0.5").optimizer.optimizer
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["momentum"] == 0.5


@shows("optim_target_modules")
def _():
    source = inspect.getsource(trainer_optimizer._setup_low_rank_optimizer)
    assert "args.optim_target_modules" in source


@shows("adam_beta1", "adam_beta2", "adam_epsilon")
def _(run):
    done = run(optim="adamw_torch", adam_beta1=0.7, adam_beta2=0.8, adam_epsilon=1e-3)
    group = done.optimizer.optimizer.param_groups[0]
    assert (group["betas"], group["eps"]) == ((0.7, 0.8), 1e-3)


def one_step(run, **args) -> dict:
    """How far one step of plain gradient descent moves each weight."""
    more = dict(max_steps=1, warmup_steps=0, lr_scheduler_type="constant", dtype=torch.float64)
    made = run.make(**more, **args)
    before = weights(made)
    made.train()
    return {name: after - before[name] for name, after in weights(made).items()}, before


@shows("weight_decay")
def _(run):
    (plain, before), (decayed, _) = one_step(run), one_step(run, weight_decay=0.5)
    for name, step in decayed.items():
        expected = plain[name] - (0 if "norm" in name else 0.05 * 0.5 * before[name])
        torch.testing.assert_close(step, expected, rtol=0, atol=1e-12)


@shows("max_grad_norm")
def _(run):
    steps, _ = one_step(run, max_grad_norm=1e-3)
    norm = torch.stack([step.norm() for step in steps.values()]).norm()
    assert norm.item() == pytest.approx(0.05 * 1e-3, rel=1e-3)


@shows("bf16")
def _(run):
    exact, rounded = run(), run(bf16=True)
    assert rounded.accelerator.mixed_precision == "bf16"
    assert logged(exact, "loss") == pytest.approx(logged(rounded, "loss"), rel=0.05)
    assert logged(exact, "loss") != logged(rounded, "loss")


@shows(
    "activation_checkpointing",
    "gradient_checkpointing",
    "activation_checkpointing_kwargs",
    "gradient_checkpointing_kwargs",
)
def _(run, name):
    flag = name.removesuffix("_kwargs")
    args = {flag: True}
    if name != flag:
        args[name] = {"every_n_layers": 2, "use_reentrant": False}
    made = run(**args)
    on = [m.gradient_checkpointing for m in made.model.modules() if type(m).__name__ in LAYERS]
    assert on == ([True, True] if name == flag else [True, False])
    assert logged(made, "loss") == logged(run(), "loss")


LAYERS = ("LlamaDecoderLayer",)


@shows("torch_compile_backend", "torch_compile_mode")
def _(run, monkeypatch):
    seen = []
    monkeypatch.setattr(fused, "compile_layers", lambda model, plugin: seen.append(plugin))
    run.make(torch_compile_backend="inductor", torch_compile_mode="reduce-overhead")
    assert [(p.backend.value, p.mode) for p in seen] == [("INDUCTOR", "reduce-overhead")]


@shows("torch_empty_cache_steps")
def _(run, monkeypatch):
    calls = []
    monkeypatch.setattr(trainer, "clear_device_cache", lambda: calls.append(1))
    run(torch_empty_cache_steps=2, num_train_epochs=2)
    assert len(calls) == 3  # of steps 0 to 5: 0, 2, 4


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


@shows("full_determinism")
def _(run, monkeypatch):
    seeds = []
    monkeypatch.setattr(transformers.trainer, "enable_full_determinism", seeds.append)
    run.make(full_determinism=True, seed=5)
    assert seeds == [5]


@shows("seed", "data_seed")
def _(run):
    losses = lambda **args: logged(run(**args), "loss")
    first = losses(seed=1)
    assert losses(seed=2) != first and losses(seed=2, data_seed=1) == first


@shows("use_cpu")
def _(run):
    assert run(use_cpu=True).args.device.type == "cpu"


@shows(
    *[name for name in THEIRS if name.startswith("ddp_") and name[4:] not in ("backend", "timeout")]
)
def _(run, name):
    value = {"ddp_bucket_cap_mb": 7}.get(name, name != "ddp_broadcast_buffers")
    handler = run.make(**{name: value}).accelerator.ddp_handler
    assert getattr(handler, name.removeprefix("ddp_")) == value


@shows("ddp_backend", "ddp_timeout")
def _(name):
    read_by(TrainingArguments._setup_devices.func, name=name)


@shows("debug")
def _(run, monkeypatch):
    watched, real = [], transformers.trainer.DebugUnderflowOverflow
    watch = lambda model: watched.append(model) or real(model)
    monkeypatch.setattr(transformers.trainer, "DebugUnderflowOverflow", watch)
    done = run(debug="underflow_overflow")
    assert watched == [done.model] and done.state.global_step == 3


@shows("skip_memory_metrics")
def _(run):
    made = run.make(skip_memory_metrics=False)
    assert "train_mem_cpu_alloc_delta" in made.train().metrics
    assert "eval_mem_cpu_alloc_delta" in made.evaluate(PAIRS[:3])
    assert not any("mem_cpu" in key for key in run.make().train().metrics)


def named_checks():
    """Each check once, or once a name where it asks for one."""
    for check in dict.fromkeys(EFFECTS.values()):
        names = [name for name, of_name in EFFECTS.items() if of_name is check]
        if "name" in inspect.signature(check).parameters:
            yield from (pytest.param(check, name, id=name) for name in names)
        else:
            yield pytest.param(check, None, id="-".join(names))


@pytest.mark.parametrize(("check", "name"), [*named_checks()])
def test_a_served_field_does_as_transformers_documents(check, name, tmp_path, monkeypatch):
    if name and name not in SePOConfig.__dataclass_fields__:
        pytest.skip(f"this transformers has no --{name}")
    given = dict(run=Run(tmp_path), monkeypatch=monkeypatch, name=name)
    check(**{key: given[key] for key in inspect.signature(check).parameters})
