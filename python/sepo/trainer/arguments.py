"""The arguments of `sepo train`: the command line over a YAML file over defaults."""

import argparse
from pathlib import Path
from types import NoneType
from typing import Any

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from sepo.errors import InputError, one_line
from sepo.flags.parser import Help, Parser
from sepo.flags.renamed import NAMES, VALUES, overridden
from sepo.flags.values import kinds
from sepo.trainer.config import SePOConfig, data_to_evaluate_on
from sepo.trainer.groups import groups
from sepo.trainer.inherited import FIELDS, Refused

NEEDED = ("model_name_or_path", "dataset_name", "output_dir")
ABOUT = (
    "Train a policy, an oracle or a reference on preference pairs. The command line wins over "
    "--config. Of a flag that takes true or false, --flag means true, --no_flag false. Help of a "
    "flag that one method reads begins with its name."
)
USAGE = (
    "sepo train [--config RUN.yaml] --model_name_or_path MODEL --dataset_name DATA "
    "--output_dir DIR [...]"
)
MANY = 12  # as many as there are methods
TAG = "tag:yaml.org,2002:"
_NOT_GIVEN = object()


class TrainParser(HfArgumentParser, Parser):
    """The flags of SePOConfig, in groups."""

    def __init__(self):
        dataclasses: Any = groups()  # of which transformers has a type of its own
        super().__init__(
            dataclasses, prog="sepo train", usage=USAGE, description=ABOUT, formatter_class=Help
        )
        self.add_argument("--config", metavar="RUN.yaml", help="YAML file of the same arguments.")
        for action in self._actions:
            verdict = FIELDS.get(action.dest)
            has_no_meaning = isinstance(verdict, Refused) and verdict.values is None
            if has_no_meaning or action.option_strings[0].startswith("--no_"):
                action.help = argparse.SUPPRESS
            if len([*(action.choices or ())]) > MANY:
                action.metavar = "NAME"  # a wrong one is answered with all that there are

    def given(self, argv: list[str]) -> dict:
        """Read what the command line says, without defaults. Raises InputError for an unknown flag."""
        names = dict.fromkeys([action.dest for action in self._actions], _NOT_GIVEN)
        found, rest = self.parse_known_args(argv, argparse.Namespace(**names))
        if rest:
            raise InputError(f"unknown argument {rest[0]}, see sepo train --help")
        return {name: value for name, value in vars(found).items() if value is not _NOT_GIVEN}


def parse(argv: list[str]) -> SePOConfig:
    """Command line over YAML over defaults. Raises InputError for a key that nobody knows."""
    parser = TrainParser()
    given = parser.given(argv)
    path = given.pop("config", None)
    values = overridden({} if path is None else _read_yaml(path, parser), given)
    for name in NEEDED:
        _demanded(name, values.get(name))
    args = SePOConfig(**values)
    if (flag := data_to_evaluate_on(args)) and args.eval_dataset_name is None:
        raise InputError(f"{flag}: expected --eval_dataset_name too, got nothing to evaluate on")
    return args


def needed(args: SePOConfig, name: str) -> str:
    """The value of one of NEEDED, without which `parse` gives no arguments."""
    return _demanded(name, getattr(args, name))


def _demanded(name: str, value: Any) -> Any:
    if value is None:
        raise InputError(f"expected --{name} on the command line or in the YAML")
    return value


def _read_yaml(path: str, parser: argparse.ArgumentParser) -> dict:
    """Every value read as the command line would read it: `no` is a word, 5e-6 a number."""
    try:
        root = yaml.compose(Path(path).read_bytes(), Loader=yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            raise InputError(f"--config {path}: expected a mapping of arguments to values")
        keys = [key.value for key, _ in root.value]
        yaml.SafeLoader("").flatten_mapping(root)  # <<: *others
    except (OSError, yaml.YAMLError, RecursionError) as error:  # of a thousand brackets
        raise InputError(f"--config {path}: {one_line(error)}") from error
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise InputError(f"--config {path}: {twice[0]}: expected once, got it twice")
    actions = {action.dest: action for action in reversed(parser._actions)}  # --x before --no_x
    values = {}
    for key, node in root.value:
        name = key.value
        now = NAMES.get(name, name) if isinstance(name, str) else None
        if now not in actions or now in ("config", "help"):
            raise InputError(f"--config {path}: unknown key {name}")
        try:
            is_old = (now, node.value) in VALUES if isinstance(node, yaml.ScalarNode) else False
            values[name] = node.value if is_old else _read_value(node, actions[now])
        except (ValueError, TypeError, argparse.ArgumentTypeError, yaml.YAMLError) as error:
            raise InputError(f"--config {path}: {name}: {one_line(error)}") from error
    return values


def _read_value(node: yaml.Node, action: argparse.Action):
    """Raises ValueError for a value that the flag does not take."""
    takes = kinds(SePOConfig)[action.dest]
    kind = {
        yaml.MappingNode: (dict, "a mapping"),
        yaml.SequenceNode: (list, "a list"),
    }.get(type(node), (NoneType, "null") if node.tag == f"{TAG}null" else None)
    if kind is not None and kind[0] not in takes:
        raise ValueError(f"expected {_wanted(action)}, got {kind[1]}")
    if isinstance(node, yaml.MappingNode):
        return yaml.SafeLoader("").construct_document(node)
    if isinstance(node, yaml.SequenceNode):
        return [_read_scalar(item, action) for item in node.value]
    if kind is not None:
        return None
    value = _read_scalar(node, action)
    return [value] if action.nargs == "+" else value


def _read_scalar(node: yaml.Node, action: argparse.Action):
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"expected {_wanted(action)}, got a list in a list")
    text = node.value
    if node.tag == f"{TAG}bool" and (action.const is True or action.type is string_to_bool):
        return yaml.SafeLoader.bool_values[text.lower()]  # on and off too
    try:
        return action.type(text) if callable(action.type) else text
    except ValueError:
        raise ValueError(f"expected {_wanted(action)}, got {text}") from None


def _wanted(action: argparse.Action) -> str:
    words = {int: "a whole number", float: "a number", string_to_bool: "true or false"}
    return words.get(action.type, "text")
