"""A YAML file is the command line in another spelling: the same values, the same refusals."""

import logging

import pytest
import torch
import yaml
from training_run import make_run, read_log
from transformers import TrainingArguments

from sepo import SePOConfig
from sepo.errors import InputError
from sepo.train import main as train
from sepo.trainer.arguments import parse

NEEDED = "model_name_or_path: M\ndataset_name: D\noutput_dir: O\nuse_cpu: true\n"


def read(tmp_path, text: str, *argv: str):
    (tmp_path / "run.yaml").write_text(NEEDED + text)
    return parse(["--config", str(tmp_path / "run.yaml"), *argv])


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("save_strategy: no", "save_strategy", "no"),
        ("eval_strategy: off\neval_dataset_name: D", "eval_strategy", InputError),
        ("logging_strategy: 'no'", "logging_strategy", "no"),
        ("report_to: none", "report_to", []),
        ("resume_from_checkpoint: true", "resume_from_checkpoint", "true"),
        ("resume_from_checkpoint: True", "resume_from_checkpoint", "true"),
        ("resume_from_checkpoint: false", "resume_from_checkpoint", None),
        ("resume_from_checkpoint: runs/1", "resume_from_checkpoint", "runs/1"),
        ("run_name: 7", "run_name", "7"),
        ("run_name: yes", "run_name", "yes"),
        ("append_eos: off", "append_eos", False),
        ("append_eos: on", "append_eos", True),
        ("gradient_checkpointing: yes", "gradient_checkpointing", True),
        ("bf16: false", "bf16", False),
        ("bf16: on", "bf16", True),
        ("learning_rate: 5e-7", "learning_rate", 5e-7),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("max_length: null", "max_length", None),
        ("max_length: ~", "max_length", None),
        ("max_length:", "max_length", None),
        ("data_seed: 7", "data_seed", 7),
        ("select: mass", "select", "mass"),
        ("lora_target_modules: all-linear", "lora_target_modules", ["all-linear"]),
        ("lora_target_modules: [up_proj, no]", "lora_target_modules", ["up_proj", "no"]),
        (
            "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1.0e-8}",
            "lr_scheduler_kwargs",
            {"min_lr": 1e-8},
        ),
        ("<<: {seed: 3}\ngamma: 1", "seed", 3),
    ],
)
def test_values(tmp_path, text, name, expected):
    if expected is InputError:
        with pytest.raises(InputError, match="--eval_strategy: expected no | steps | epoch"):
            read(tmp_path, text)
        return
    found = getattr(read(tmp_path, text), name)
    assert found == expected
    assert isinstance(expected, str) or type(found) is type(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: null", "learning_rate: expected a number, got null"),
        ("learning_rate:", "learning_rate: expected a number, got null"),
        ("learning_rate: [1, 2]", "learning_rate: expected a number, got a list"),
        ("learning_rate: {a: 1}", "learning_rate: expected a number, got a mapping"),
        ("learning_rate: true", "learning_rate: expected a number, got true"),
        ("max_steps: 1.5", "max_steps: expected a whole number, got 1.5"),
        ("max_steps: ten", "max_steps: expected a whole number, got ten"),
        ("pairs_per_step: null", "pairs_per_step: expected a whole number, got null"),
        ("append_eos: perhaps", "append_eos: Truthy value expected: got perhaps"),
        ("append_eos: null", "append_eos: expected true or false, got null"),
        ("model_name_or_path: [a]", "model_name_or_path: expected once"),
        ("method: [sepo]", "method: expected text, got a list"),
        ("lora_target_modules: [[a]]", "lora_target_modules: expected text, got a list in a list"),
        ("seed: 1\nseed: 2", "seed: expected once, got it twice"),
        ("config: other.yaml", "unknown key config"),
        ("help: true", "unknown key help"),
        ("[a]: 1", "unknown key"),
        ("3: 1", "unknown key 3"),
        ("a: [", "expected the node content"),
        ("a: !!python/object:os.system x", "unknown key a"),
    ],
)
def test_refusals_name_file_and_key(tmp_path, text, message):
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(f"--config {tmp_path / 'run.yaml'}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("save_strategy: maybe", "--save_strategy: expected no | steps | epoch | best, got maybe"),
        ("save_strategy: true", "--save_strategy: expected no | steps | epoch | best, got true"),
        ("learning_rate: .nan", "learning_rate: expected a number, got .nan"),
        ("learning_rate: nan", "--learning_rate: expected a finite number, got nan"),
        ("gamma: inf", "--gamma: expected a finite number, got inf"),
        ("seed: -1", "--seed: expected a whole number from 0 to 2**32 - 1, got -1"),
        ("seed: 4294967296", "--seed: expected a whole number from 0 to 2**32 - 1"),
        ("data_seed: -7", "--data_seed: expected a whole number from 0 to 2**32 - 1, got -7"),
        ("eval_strategy: steps", "--eval_strategy steps: expected --eval_dataset_name too"),
        ("eval_on_start: true", "--eval_on_start: expected --eval_dataset_name too"),
        ("report_to: wandb", "--report_to wandb: its package is not installed"),
        ("report_to: [tensorboard, paper]", "--report_to"),
        ("optim: adamw_8bit", "--optim adamw_8bit: You need to install `bitsandbytes`"),
        ("optim: schedule_free_adamw", "--optim schedule_free_adamw: You need to install"),
        ("adam_beta1: 1.5", "--adam_beta1: expected a number in [0, 1), got 1.5"),
        ("lr_scheduler_kwargs: {speed: 1}", "--lr_scheduler_type cosine: "),
        ("lr_scheduler_kwargs: fast", "--lr_scheduler_kwargs: expected a JSON object, got fast"),
        ("deepspeed: /no/where.json", "--deepspeed: expected a JSON object, or a file of one"),
        ("torch_compile_backend: gcc", "--torch_compile_backend: expected no | eager"),
        ("torch_compile_mode: quick", "--torch_compile_mode: expected default | "),
        ("logging_steps: 0", "--logging_steps: expected a positive number, got 0.0"),
        ("save_steps: -5", "--save_steps: expected a positive number, got -5.0"),
        ("num_train_epochs: 0", "--num_train_epochs: expected a positive number, got 0.0"),
        ("max_steps: -3", "--max_steps: expected a positive number, or -1"),
        ("lora_dropout: 1.5", "--lora_dropout: expected a number in [0, 1), got 1.5"),
    ],
)
def test_what_the_yaml_says_is_checked_as_the_command_line(tmp_path, text, message):
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)
    name, _, value = text.partition(": ")
    if not value.startswith(("{", "[")):
        with pytest.raises(InputError, match=f"--{name}"):
            read(tmp_path, "", f"--{name}={value}")


def test_a_yaml_that_asks_to_resume_continues(tmp_path):
    base = make_run(tmp_path, lr_scheduler_type="constant", warmup_steps=0)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train([*base, "--output_dir", str(whole), "--max_steps", "3"])
    train([*base, "--output_dir", str(cut), "--max_steps", "2"])
    values = yaml.safe_load((tmp_path / "run.yaml").read_text())
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**values, "resume_from_checkpoint": True}))
    train([*base, "--output_dir", str(cut), "--max_steps", "3"])
    losses = lambda path: {line["step"]: line["loss"] for line in read_log(path) if "loss" in line}
    assert losses(cut) == losses(whole) and sorted(losses(cut)) == [1, 2, 3]
    same = lambda path: (path / "model.safetensors").read_bytes()
    assert same(cut) == same(whole)


def test_false_does_not_open_a_folder_that_is_in_use(tmp_path):
    base = make_run(tmp_path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "precious").touch()
    for word in ("false", "False"):
        with pytest.raises(InputError, match="is not empty"):
            used = ["--output_dir", str(tmp_path / "used")]
            train([*base, *used, "--resume_from_checkpoint", word])


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("method: dpo\ngamma: 3", "--gamma does nothing with --method dpo"),
        ("method: simpo\nfraction: 0.5", "--fraction does nothing with --method simpo"),
        ("beta: 0.5", "--beta does nothing with --method sepo"),
        ("mass: 0.5", "--mass does nothing without --select mass"),
        ("select: mass\nfraction: 0.5", "--fraction does nothing with --select mass"),
        (
            "rejected_select: mass\nrejected_fraction: 0.5",
            "--rejected_fraction does nothing with --rejected_select mass",
        ),
        ("method: tdpo1\nmask_learning_rate: 1", "--mask_learning_rate does nothing with"),
        ("eval_steps: 5", "--eval_steps does nothing without --eval_strategy steps"),
        ("method: sepo\nfraction: 0.5\ngamma: 3\nmargin: 1", None),
        ("select: mass\nmass: 0.5", None),
        ("select: mass\nfraction: 0.5\nrejected_select: fraction", None),
        ("method: sparsepo\nmask_l1: 0.1\nkl_mask_l1: 0.2\nform: paper", None),
        ("", None),
    ],
)
def test_flags_that_do_nothing_are_said(tmp_path, text, note, caplog):
    from sepo.trainer.methods import idle_settings

    notes = [*idle_settings(read(tmp_path, text)), *caplog.messages]
    assert (notes == []) if note is None else any(note in line for line in notes)


def test_flags_that_a_store_has_no_use_for_are_said(tmp_path, caplog):
    base = make_run(tmp_path)
    flags = ["--max_length", "64", "--dataset_split", "test", "--lora_r", "4", "--gamma", "2.5"]
    flags += ["--eval_dataset_split", "train"]
    with caplog.at_level(logging.WARNING, "sepo.flags.options"):
        train([*base, *flags, "--output_dir", str(tmp_path / "out"), "--max_steps", "1"])
    store = f"{tmp_path / 'store'} is a scored store, whose pairs are taken as they are"
    assert [m for n, _, m in caplog.record_tuples if n == "sepo.flags.options"] == [
        f"--dataset_split does nothing: {store}",
        f"--max_length does nothing: {store}",
        "--eval_dataset_split does nothing without --eval_dataset_name",
        "--lora_r does nothing without --use_peft",
    ]


def test_a_ranks_cpu_has_no_number(tmp_path, monkeypatch):
    """torch.load can't restore to cpu:0, where transformers 5.17 wants the optimiser's state."""
    for place, expected in (("cpu:0", "cpu"), ("cuda:1", "cuda:1")):
        there = property(lambda args, place=place: torch.device(place))
        monkeypatch.setattr(TrainingArguments, "device", there)
        assert str(SePOConfig(output_dir=str(tmp_path)).device) == expected
