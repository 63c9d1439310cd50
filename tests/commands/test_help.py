"""Help is written for users: what a command is for, its own flags first, each once."""

import re
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
from processes import ENVIRONMENT
from transformers import TrainingArguments

import sepo
from sepo import SePOConfig
from sepo.commands import demo
from sepo.commands.main import COMMANDS, make_parser
from sepo.demo import DATA
from sepo.flags.parser import Parser
from sepo.trainer.arguments import TrainParser
from sepo.trainer.groups import GROUPS, REST
from sepo.trainer.inherited import FIELDS, Refused


@pytest.fixture(scope="module")
def train_help() -> str:
    return TrainParser().format_help()


def test_sepo_says_what_it_is_and_what_comes_first():
    text = make_parser(None).format_help()
    about, _, rest = text.partition("commands:")
    assert "Token-level preference optimisation" in about and about.count("\n") < 10
    listed = re.findall(r"^    (\w+) ", rest, re.MULTILINE)
    assert listed == [name for name, _, _ in COMMANDS]
    assert listed.index("inspect") < listed.index("score") < listed.index("train")
    assert "docs/tutorial.md" in rest


@pytest.mark.parametrize("way", [["-m", "sepo"], ["-m", "sepo.commands.main"]])
def test_version(way):
    done = subprocess.run(
        [sys.executable, *way, "--version"], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"sepo {sepo.__version__}\n")


def test_no_command_is_a_refusal(capsys):
    with pytest.raises(sepo.errors.InputError, match="required: COMMAND"):
        make_parser(None).parse_args([])


def test_every_field_is_in_one_group():
    named = Counter(name for names in GROUPS.values() for name in names)
    assert set(named.values()) == {1}
    own = {*SePOConfig.__annotations__} - {"_argument_group_name"}
    assert own <= set(named) <= {field.name for field in fields(SePOConfig)}


def test_flags_of_this_project_come_first(train_help):
    lines = train_help.splitlines()
    method = next(i for i, line in enumerate(lines) if line.startswith("  --method"))
    assert method < 24 and "usage: sepo train" in lines[0] and not lines[1]  # a screen; one line
    ours, theirs = train_help.split(f"\n{REST}:\n")
    shown = [set(re.findall(r"^  --(\w+)", text, re.MULTILINE)) for text in (ours, theirs)]
    assert {name for names in GROUPS.values() for name in names} | {"config"} == shown[0]
    inherited = {field.name for field in fields(TrainingArguments) if field.init}
    refused = {n for n, v in FIELDS.items() if isinstance(v, Refused) and v.values is None}
    assert shown[1] == inherited - shown[0] - refused and "per_device_train_batch_size" in refused
    assert max(map(len, lines)) <= 120


def test_a_flag_is_shown_once(train_help):
    flags = re.findall(r"^  --(\w+)", train_help, re.MULTILINE)
    assert len(flags) == len(set(flags)) and "default: None" not in train_help
    assert not [flag for flag in flags if flag.startswith("no_")]


def test_hidden_spellings_work():
    parser = TrainParser()
    given = parser.given(["--no_append_eos", "--pairs-per-step", "3", "--disable_dropout", "false"])
    assert given == {"append_eos": False, "pairs_per_step": 3, "disable_dropout": False}


def test_the_demo_needs_no_repository(tmp_path, monkeypatch):
    """Its data is found beside its module, its output goes below the folder where it starts."""
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(demo, "run_demo", lambda *args, **named: asked.append((args, named)))
    parser = Parser()
    demo.add_arguments(parser)
    demo.run(parser.parse_args([]))
    (((place, data), named),) = asked
    assert place == Path("runs/demo") and data == DATA and data.is_absolute()
    assert {"pairs.jsonl", "heldout.jsonl", "heldout_openings.txt"} <= {
        path.name for path in data.iterdir()
    }
    assert named == dict(oracle_pairs=160, per_opening=4, seed=0)
