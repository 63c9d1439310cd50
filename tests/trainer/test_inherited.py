"""Each of transformers' TrainingArguments does what transformers documents, or is refused by name.

A field that the installed transformers has and the table has not fails the first test, and nothing
else. Fields that are served have an effect to show, in served_training.py and served_outputs.py.
"""

import inspect
from dataclasses import MISSING, replace
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from served_fields import EFFECTS, THEIRS, Run
from trainer import served_outputs, served_training

from sepo import SePOConfig
from sepo.errors import InputError
from sepo.trainer.arguments import parse
from sepo.trainer.inherited import FIELDS, Decided, Needs, Refused

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
BASE = dict(output_dir="x", use_cpu=True)
SERVED = served_outputs, served_training  # whose checks fill EFFECTS


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


def test_every_field_has_a_verdict_that_a_test_shows():
    assert {check.__module__ for check in EFFECTS.values()} == {m.__name__ for m in SERVED}
    shown = EFFECTS.keys() | ELSEWHERE.keys() | ON_A_GPU.keys() | {*of(Refused), *of(Decided)}
    assert not THEIRS.keys() - shown
    for name, file in ELSEWHERE.items():
        assert name in (TESTS / file).read_text(), f"{file} says nothing of {name}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="then it is served")
@pytest.mark.parametrize("name", sorted(ON_A_GPU))
def test_what_needs_a_gpu_says_so(name):
    with pytest.raises(InputError, match=ON_A_GPU[name]):
        SePOConfig(**BASE, **{name: True})


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
