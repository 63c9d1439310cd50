"""`sepo COMMAND`: find the command's module and run it."""

import argparse
import sys
from importlib import import_module

import sepo
from sepo.errors import EXTRAS, exit_with_one_line, needs
from sepo.flags.parser import Parser
from sepo.system.settings import check_settings

ABOUT = """
Token-level preference optimisation: an oracle scores every token of preference pairs, and a policy
is trained on the decisive ones alone, without computing the logits of any other token.
"""
READ_ON = """
sepo COMMAND --help     the flags of a command
sepo demo               all of it on a small real model: where to start
docs/tutorial.md        the same step by step on your own data, in the source tree
docs/README.md          what else there is to read
"""
COMMANDS = (  # in the order of use: name, the module that adds its flags and runs it, what it does
    ("demo", "sepo.commands.demo", "the whole method on a small real model, on this machine"),
    (
        "inspect",
        "sepo.commands.inspect",
        "look at pairs as the trainer will see them, and count what drops",
    ),
    (
        "score",
        "sepo.commands.score",
        "oracle minus reference log-probability of every response token",
    ),
    ("transfer", "sepo.commands.transfer", "an oracle's scores in the tokens of another tokenizer"),
    (
        "plan",
        "sepo.commands.plan",
        "GPU-hours of a recipe, and how full micro-batches are: modelled",
    ),
    ("train", "sepo.train", "train a policy, an oracle or a reference"),
    ("report", "sepo.commands.report", "scores, selections and training curves as one HTML page"),
    ("env", "sepo.commands.env", "versions and devices, for a bug report"),
)


def main() -> None:
    exit_with_one_line(run)


def run(argv: list[str] | None = None) -> None:
    """Run the command that `argv` names. Raises InputError for one that there is not."""
    argv = sys.argv[1:] if argv is None else argv
    check_settings()
    named = argv[0] if argv else None
    with needs(named if named in EXTRAS else "train", f"sepo {named}"):
        if named == "train":  # SePOConfig has a parser of its own
            from sepo.train import main as train

            return train(argv[1:])
        args = make_parser(named).parse_args(argv)
        args.run(args)


def make_parser(named: str | None) -> Parser:
    """Know every command, and the flags of the one that is named: imports take their time."""
    parser = Parser(
        prog="sepo",
        description=ABOUT,
        epilog=READ_ON,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sepo {sepo.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for name, module_name, text in COMMANDS:
        command = commands.add_parser(name, help=text, description=text, add_help=name != "train")
        if name == named:
            module = import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    main()
