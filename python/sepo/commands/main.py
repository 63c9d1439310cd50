"""`sepo COMMAND`: find the command's module and run it."""

import argparse
import sys
from importlib import import_module

from sepo.errors import InputError, exit_with_one_line
from sepo.system.settings import check_settings

COMMANDS = (  # in the order of use: name, the module that adds its flags and runs it, what it does
    ("demo", "sepo.commands.demo", "the whole method on a small real model, on this machine"),
    (
        "score",
        "sepo.commands.score",
        "oracle minus reference log-probability of every response token",
    ),
    ("transfer", "sepo.commands.transfer", "an oracle's scores in the tokens of another tokenizer"),
    (
        "inspect",
        "sepo.commands.inspect",
        "look at rows as the trainer will see them, and count what drops",
    ),
    ("report", "sepo.commands.report", "scores, selections and training curves as one HTML page"),
    ("env", "sepo.commands.env", "versions and devices, for a bug report"),
)


def main() -> None:
    exit_with_one_line(run)


def run(argv: list[str] | None = None) -> None:
    """Run the command that `argv` names. Raises InputError for one that there is not."""
    argv = sys.argv[1:] if argv is None else argv
    check_settings()
    if argv and argv[0] == "train":  # SePOConfig has a parser of its own
        from sepo.train import main as train

        return train(argv[1:])
    parser = argparse.ArgumentParser(prog="sepo", description=__doc__)
    parser.error = _raise_input_error
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("train", help="train a policy, an oracle or a reference", add_help=False)
    for name, module_name, text in COMMANDS:
        command = commands.add_parser(name, help=text, description=text)
        command.error = _raise_input_error
        if argv and argv[0] == name:  # the others' imports are not worth the wait
            module = import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    args.run(args)


def _raise_input_error(message: str) -> None:
    raise InputError(message)


if __name__ == "__main__":
    main()
