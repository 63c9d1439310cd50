"""`sepo COMMAND`: each command's arguments and work live in the module of its name."""

import argparse
import platform
import sys

from sepo.errors import InputError, exit_with_one_line


def main() -> None:
    exit_with_one_line(run)


def run(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
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
            module = __import__(module_name, fromlist=["run"])
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    commands.add_parser("env", help="versions and devices, for a bug report").set_defaults(run=env)
    args = parser.parse_args(argv)
    args.run(args)


COMMANDS = (
    ("demo", "sepo.demo.run", "the whole method on a small real model, on this machine"),
    ("score", "sepo.score", "oracle minus reference log-probability of every response token"),
    ("transfer", "sepo.transfer", "an oracle's scores in the tokens of another tokenizer"),
    ("inspect", "sepo.inspect", "look at rows as the trainer will see them, and count what drops"),
)


def env(args: argparse.Namespace) -> None:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import sepo

    print(f"sepo {sepo.__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in ("torch", "transformers", "accelerate", "datasets", "pyarrow", "triton"):
        try:
            print(f"{name} {version(name)}")
        except PackageNotFoundError:
            print(f"{name} not installed")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"devices: {', '.join(devices) or 'cpu'}, {torch.get_num_threads()} CPU threads")


def _raise_input_error(message: str) -> None:
    raise InputError(message)


if __name__ == "__main__":
    main()
