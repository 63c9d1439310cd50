"""Check what SePOTrainer takes: a model, token pairs or rows, one data set to evaluate on or several."""

from collections.abc import Callable, Sequence

from torch import nn

from sepo.data.read.load import is_rows
from sepo.data.read.read import read_pairs
from sepo.data.types import TokenPair
from sepo.errors import InputError
from sepo.flags.reading import tokens_of
from sepo.terminal import say
from sepo.trainer.config import SePOConfig, data_to_evaluate_on
from sepo.trainer.methods import Method
from sepo.trainer.metrics import metric_names


def check_kinds(model, args, eval_dataset) -> None:
    """Raise InputError for what is no model, no SePOConfig, or lacks what a flag evaluates on."""
    if not isinstance(args, SePOConfig):
        raise InputError(f"args: expected a SePOConfig, got {type(args).__name__}")
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model: expected a model, as sepo.model.load_model loads it, got {type(model).__name__}"
        )
    if eval_dataset is None and (flag := data_to_evaluate_on(args)):
        raise InputError(f"{flag}: expected eval_dataset too, got nothing to evaluate on")


def check_best_metric(args: SePOConfig, method: Method, eval_dataset) -> None:
    """Raise InputError for a --metric_for_best_model that no evaluation reports."""
    if args.metric_for_best_model is None or eval_dataset is None:
        return
    parts = eval_dataset if isinstance(eval_dataset, dict) else [None]
    names = [n if p is None else f"{p}_{n}" for p in parts for n in metric_names(method)]
    if args.metric_for_best_model.removeprefix("eval_") not in names:
        raise InputError(
            f"--metric_for_best_model: expected {' | '.join(names)}, "
            f"got {args.metric_for_best_model}"
        )


def tokenised(data, args: SePOConfig, tokenizer) -> Sequence[TokenPair] | None:
    """Token pairs as they are; rows of text read, and what was dropped of them printed."""
    if data is None:
        return None
    if not is_rows(data):
        if reason := _why_no_pairs(data):
            raise InputError(f"expected token pairs or a datasets.Dataset of rows, got {reason}")
        return data
    read = read_pairs(data, tokenizer, **tokens_of(args))
    if args.should_log:
        say(str(read.report))
    return read.pairs


def each(function: Callable, data, *args):
    """The function of a data set, or of each one of a dict of them."""
    if isinstance(data, dict):
        return {name: function(part, *args) for name, part in data.items()}
    return function(data, *args)


def _why_no_pairs(data) -> str | None:
    name = type(data).__name__
    if isinstance(data, dict):
        return f"a {name}: name one of {', '.join(map(str, data))}"
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__") or isinstance(data, str):
        return f"{name}, which has no length: datasets.Dataset.from_list(list(rows)) has"
    if len(data) and not isinstance(first := data[0], TokenPair):
        return f"a {name} of {type(first).__name__}"
    return None
