"""The arguments of `sepo train`: the command line over a YAML file over defaults."""

import argparse
from pathlib import Path
from types import NoneType
from typing import NoReturn

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from sepo.errors import InputError, one_line
from sepo.flags.values import kinds
from sepo.trainer.config import SePOConfig, data_to_evaluate_on

NEEDED = ("model_name_or_path", "dataset_name", "output_dir")
PROG = dict(prog="sepo train", description=__doc__)
TAG = "tag:yaml.org,2002:"


def parse(argv: list[str]) -> SePOConfig:
    """Command line over YAML over defaults. Raises InputError for a key that nobody knows."""
    parser = HfArgumentParser(SePOConfig, **PROG)
    parser.add_argument("--config", help="YAML file of the same arguments; the command line wins.")
    parser.error = _raise_input_error
    config_path = parser.parse_known_args(argv)[0].config
    if config_path is not None:
        parser.set_defaults(**_read_yaml(config_path, parser))
    namespace, rest = parser.parse_known_args(argv)
    if rest:
        raise InputError(f"unknown argument {rest[0]}, see sepo train --help")
    for flag in NEEDED:
        if getattr(namespace, flag) is None:
            raise InputError(f"expected --{flag} on the command line or in the YAML")
    args = SePOConfig(**{k: v for k, v in vars(namespace).items() if k != "config"})
    if (flag := data_to_evaluate_on(args)) and args.eval_dataset_name is None:
        raise InputError(f"{flag}: expected --eval_dataset_name too, got nothing to evaluate on")
    return args


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
        if not isinstance(name, str) or name not in actions or name in ("config", "help"):
            raise InputError(f"--config {path}: unknown key {name}")
        try:
            values[name] = _read_value(node, actions[name])
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
        return action.type(text)
    except ValueError:
        raise ValueError(f"expected {_wanted(action)}, got {text}") from None


def _wanted(action: argparse.Action) -> str:
    words = {int: "a whole number", float: "a number", string_to_bool: "true or false"}
    return words.get(action.type, "text")


def _raise_input_error(message: str) -> NoReturn:
    raise InputError(message)
