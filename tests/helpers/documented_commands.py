"""The commands that pages and recipes show, parsed as the program would."""

import shlex
from importlib import import_module

import pytest

from sepo.commands.main import COMMANDS
from sepo.flags.parser import Parser
from sepo.train import parse
from sepo.trainer.methods import METHODS


def commands(text: str) -> list[list[str]]:
    """The `sepo` commands among the lines of a text, without `sepo` or a launcher."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        if "sepo" not in line:
            continue
        words = shlex.split(line, comments=True)
        if words[:1] == ["sepo"]:
            found.append(words[1:])
        elif "sepo.train" in words:  # python -m, torchrun -m, accelerate launch -m
            found.append(["train", *words[words.index("sepo.train") + 1 :]])
    return found


def check(words: list[str]) -> None:
    """Parse one command as `sepo` would, without running it."""
    command, *argv = words
    if command == "train":
        # what the machine has is not the command's fault
        argv = [word for word in argv if word not in ("--load_in_4bit", "--use_liger_kernel")]
        # a page may leave to the reader what it is not about
        fragment = ["--model_name_or_path", "M", "--dataset_name", "D", "--output_dir", "O"]
        assert parse([*fragment, *argv, "--use_cpu"]).method in METHODS
        return
    modules = {command: module for command, module, _ in COMMANDS}
    assert command in modules, f"sepo has no command {command}"
    parser = Parser(prog=f"sepo {command}")
    parser.error = lambda message: pytest.fail(f"sepo {shlex.join(words)}: {message}")
    import_module(modules[command]).add_arguments(parser)
    parser.parse_args(argv)
