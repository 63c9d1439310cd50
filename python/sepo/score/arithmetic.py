"""Which arithmetic a model scores in: as asked for, or the fastest whose selection is float32's."""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from sepo.data.types import TokenPair
from sepo.errors import InputError
from sepo.score.logp import dtype_name, response_logp
from sepo.score.precision import FRACTIONS, compare_scores, difference, evenly_spread, kept_or_found
from sepo.score.products import HALVES, SplitProducts, why_slow
from sepo.terminal import say

AUTO = "auto"
ARITHMETICS = ("float32", *HALVES, "bfloat16", "float16")
SAME = (
    0.995  # of float32's selection, at each of FRACTIONS: a selection that is taken for float32's
)


class Chosen(NamedTuple):
    """In what the models score."""

    arithmetics: dict[str, str]  # by role
    products: dict[str, SplitProducts]  # by role, where they are of halves
    check: dict | None = None  # what `auto` found of the sample
    reason: str | None = None  # why `auto` took what it took


def choose_arithmetic(
    asked: Mapping[str, str],  # by role: AUTO, or one of ARITHMETICS
    models: Mapping[str, PreTrainedModel],  # by role
    pairs: Sequence[TokenPair],
    number: int,  # of pairs that `auto` compares
    max_tokens: int,
    begun: Mapping[str, str],  # by role, of a store that is continued: `auto` takes the same
) -> Chosen:
    """Settle what `auto` means and make the halves. Prints what was taken, and why.

    Raises InputError for an arithmetic that is not the model's dtype or that its device lacks, and
    for `auto` without a pair to compare.
    """
    settled, check, reason = dict(asked), None, None
    open_roles = [role for role, name in asked.items() if name == AUTO]
    for role in open_roles:
        if models[role].dtype != torch.float32:
            raise InputError(
                f"{role}: arithmetic {AUTO} expects a float32 model, got {dtype_name(models[role])}"
            )
    if open_roles and begun.keys() >= set(open_roles):
        settled |= {role: begun[role] for role in open_roles}
        reason = "the store was begun in it"
    elif open_roles:
        fastest, check, reason = _fastest(open_roles, asked, models, pairs, number, max_tokens)
        settled |= dict.fromkeys(open_roles, fastest)
    products: dict[str, SplitProducts] = {}
    for role, name in settled.items():
        _check(role, name, models[role])
        if name in HALVES:
            products[role] = SplitProducts(models[role], name, products.values())
            say(f"{role}: {_about(name, products[role], models[role])}")
    if reason is not None:
        say(f"arithmetic: {settled[open_roles[0]]}; {reason}")
    return Chosen(settled, products, check, reason)


def _check(role: str, name: str, model: PreTrainedModel) -> None:
    held = "float32" if name in HALVES else name
    if dtype_name(model) != held:
        raise InputError(
            f"{role}: arithmetic {name} expects a {held} model, got {dtype_name(model)}"
        )


def _about(name: str, products: SplitProducts, model: PreTrainedModel) -> str:
    half = HALVES[name]
    slow = why_slow(name, model.device)
    return (
        f"{name}, {products.layers} products of weights from {half} halves, "
        f"{products.of_two} of them by two" + (f"; {slow}" if slow else "")
    )


def _fastest(
    roles: Sequence[str],
    asked: Mapping[str, str],
    models: Mapping[str, PreTrainedModel],
    pairs: Sequence[TokenPair],
    number: int,
    max_tokens: int,
) -> tuple[str, dict | None, str]:  # the arithmetic, what was found of it, why
    """Score a sample in float32 and in halves; bfloat16 is not tried, no study found it good."""
    slow = {name: _why_not(name, [models[role] for role in roles]) for name in HALVES}
    candidates = [name for name, reason in slow.items() if reason is None]
    if not candidates:
        return "float32", None, str(slow["split"])
    if "oracle" not in models:
        return "float32", None, "without an oracle there is no selection to compare"
    if number < 1:
        raise InputError(f"arithmetic {AUTO} expects at least 1 pair to compare, got {number}")
    sample = evenly_spread(pairs, number)
    others = {role: name for role, name in asked.items() if role not in roles and name in HALVES}
    exact, seconds = _timed(sample, models, others, max_tokens)
    taken, check, told = ("float32", seconds), None, [f"float32 took {seconds:.2g} s"]
    for name in candidates:
        found, seconds = _timed(sample, models, others | dict.fromkeys(roles, name), max_tokens)
        result = compare_scores(found, exact)
        kept = [2 * j / (1 + j) for j in result["overlap"].values()]
        told.append(f"{name} {seconds:.2g} s with {_kept(kept)} of its selection")
        if min(kept) >= SAME and seconds < taken[1]:
            taken, check = (name, seconds), result | {"arithmetic": name, "seconds": seconds}
    return taken[0], check, f"on {len(sample)} pairs " + ", ".join(told)


def _kept(shares: Sequence[float]) -> str:
    return ", ".join(f"{s:.1%} at {f:.0%}" for s, f in zip(shares, FRACTIONS, strict=True))


def _why_not(name: str, models: Sequence[PreTrainedModel]) -> str | None:
    return next((why for model in models if (why := why_slow(name, model.device))), None)


def _timed(
    sample: list[TokenPair],
    models: Mapping[str, PreTrainedModel],
    halved: Mapping[str, str],  # by role
    max_tokens: int,
) -> tuple[list, float]:  # scores, seconds
    products: dict[str, SplitProducts] = {}
    for role, name in halved.items():
        products[role] = SplitProducts(models[role], name, products.values())
    logp = lambda pairs: {
        role: response_logp(model, pairs, role, max_tokens, products=products.get(role))
        for role, model in models.items()
    }
    logp(sample[:1])  # kernels are compiled, libraries set up
    start = time.perf_counter()
    found = logp(sample)
    return difference(kept_or_found(sample, found)), time.perf_counter() - start
