"""What `auto` comes to on a machine that is slow at bfloat16, and what is said of bfloat16 there."""

import re
import subprocess
import sys

import pytest
import torch
from processes import AVX2_ALONE, ENVIRONMENT
from scoring_for_tests import save_models
from training_run import make_run

from sepo import SePOConfig
from sepo.commands import score as score_command
from sepo.errors import InputError
from sepo.flags.parser import Parser
from sepo.train import parse
from sepo_kernels import devices

NAMES = "--model_name_or_path M --dataset_name D --output_dir O".split()


@pytest.fixture
def bfloat16_takes(monkeypatch):
    """A machine on which a bfloat16 product takes so many times as long as one in float32."""

    def pretend(ratio: float):
        of = {torch.float32: 1.0, torch.bfloat16: ratio}
        monkeypatch.setattr(devices, "_gemm_seconds", lambda a: of[a.dtype])
        devices.bfloat16_speed.cache_clear()

    yield pretend
    devices.bfloat16_speed.cache_clear()


@pytest.mark.parametrize(
    ("words", "slow", "fast"),
    [
        ("", False, False),
        ("--bf16", True, True),
        ("--bf16 true", True, True),
        ("--bf16 false", False, False),
        ("--bf16 auto", False, True),
        ("--bf16 auto --use_cpu", False, True),
    ],
)
def test_the_flag(bfloat16_takes, words, slow, fast):
    for ratio, expected in ((66, slow), (0.25, fast)):
        bfloat16_takes(ratio)
        assert parse([*NAMES, *words.split()]).bf16 is expected


def test_a_file_may_say_auto_and_the_command_line_wins(bfloat16_takes, tmp_path):
    (tmp_path / "run.yaml").write_text("bf16: auto\n")
    bfloat16_takes(0.25)
    argv = [*NAMES, "--config", str(tmp_path / "run.yaml")]
    assert parse(argv).bf16 is True and parse([*argv, "--bf16", "false"]).bf16 is False


def test_another_word_is_refused():
    with pytest.raises(InputError, match=r"--bf16: expected true \| false \| auto, got perhaps"):
        parse([*NAMES, "--bf16", "perhaps"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (dict(bf16=True), "--bf16: .* takes 66 times as long; leave it out, or say --bf16 auto"),
        (dict(dtype="bfloat16"), "--dtype bfloat16: .* takes 66 times as long; leave it out"),
        (dict(dtype="bfloat16", bf16=True), "--bf16: .* 66 times as long; .*"),
        (dict(bf16="auto"), None),
        ({}, None),
    ],
)
def test_who_asks_for_it_all_the_same_is_warned_once(bfloat16_takes, caplog, arguments, expected):
    bfloat16_takes(66)
    SePOConfig(output_dir="-", use_cpu=True, **arguments)
    assert len(caplog.messages) == (expected is not None)
    if expected is not None:
        assert re.fullmatch(expected, caplog.messages[0])
    bfloat16_takes(0.25)
    SePOConfig(output_dir="-", use_cpu=True, **arguments)
    assert len(caplog.messages) == (expected is not None)


@pytest.mark.parametrize(
    ("flags", "flag"),
    [
        ("--arithmetic bfloat16", "--arithmetic bfloat16"),
        ("--oracle_arithmetic bfloat16", "--oracle_arithmetic bfloat16"),
        ("--arithmetic bfloat16 --oracle_arithmetic float32", "--arithmetic bfloat16"),
        ("--dtype bfloat16", "--arithmetic bfloat16"),
        ("--arithmetic float32", None),
    ],
)
def test_scoring_is_warned_of_too(bfloat16_takes, caplog, monkeypatch, tmp_path, flags, flag):
    bfloat16_takes(66)
    monkeypatch.setattr(score_command, "score_dataset", lambda *a, **k: None)
    reference, oracle = save_models(tmp_path)
    (tmp_path / "data.jsonl").write_text(
        '{"prompt_ids": [2], "chosen_ids": [3], "rejected_ids": [4]}'
    )
    parser = Parser()
    score_command.add_arguments(parser)
    words = ["--dataset_name", str(tmp_path / "data.jsonl"), "--output_dir", str(tmp_path / "out")]
    words += ["--reference", reference, "--oracle", oracle, "--device", "cpu", *flags.split()]
    score_command.run(parser.parse_args(words))
    said = [m for m in caplog.messages if "times as long" in m]
    assert [m.split(":")[0] for m in said] == [flag] * (flag is not None)


def test_a_run_on_such_a_machine_says_so_in_one_line(tmp_path):
    argv = [*make_run(tmp_path, max_steps=1, save_strategy="no"), "--output_dir", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-m", "sepo.train", *map(str, argv), "--bf16"],
        env=ENVIRONMENT | AVX2_ALONE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in (done.stdout + done.stderr).splitlines() if "times as long" in line]
    assert len(said) == 1 and said[0].startswith("--bf16: expected a CPU that multiplies bfloat16")
