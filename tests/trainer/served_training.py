"""Fields that change how a run trains: what shows that they do."""

import inspect
from pathlib import Path

import pytest
import torch
import transformers
from served_fields import THEIRS, logged, read_by, shows
from tiny_trainer import weights
from transformers import (
    TrainingArguments,
    trainer_optimizer,
)

from sepo.trainer import fused, trainer


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
