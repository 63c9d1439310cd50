"""Measure what a reduced precision does to scores and to the tokens selected by them.

A score is a small difference of two large numbers. An oracle trained lightly spreads its scores
over a few tenths of a nat, which is what the rounding of a bfloat16 trunk amounts to.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType

import numpy as np
import torch
from transformers import PreTrainedModel

from sepo.data.selection import Selection
from sepo.data.types import TokenPair
from sepo.errors import InputError
from sepo.model.load import load_model
from sepo.score.logp import dtype_name, kept_logp, response_logp
from sepo.score.products import SplitProducts

FRACTIONS = (0.1, 0.3, 0.5)


def check_precision(
    pairs: Sequence[TokenPair],
    oracle: PreTrainedModel | None,
    reference: PreTrainedModel | None,  # None: the pairs carry its log-probabilities
    number: int,
    max_tokens: int,
    products: Mapping[str, SplitProducts] = MappingProxyType({}),  # by role, of halves
) -> dict | None:
    """Score evenly spread pairs in float32 too, and print what `compare_scores` finds.

    None where no model has a lower precision, or products of halves. Without an oracle the reference's log-probabilities
    are compared, and nothing is said about selection. Kept log-probabilities are taken as exact.
    """
    given = {"reference": reference, "oracle": oracle}
    models = {role: model for role, model in given.items() if model is not None}
    exact_already = all(model.dtype.itemsize >= 4 for model in models.values()) and not products
    if number < 1 or exact_already:
        return None
    sample = evenly_spread(pairs, number)
    logp, exact_logp, weights = {}, {}, set()
    for role, model in models.items():
        logp[role] = response_logp(model, sample, role, max_tokens, products=products.get(role))
        exact, origin = _in_float32(model)
        exact_logp[role] = response_logp(exact, sample, role, max_tokens)
        weights.add(origin)
        del exact  # before the next one is loaded: memory may not hold two
    dtypes = " and ".join(
        f"{role} {products[role].arithmetic if role in products else dtype_name(model)}"
        for role, model in models.items()
    )
    result = compare_scores(
        *(difference(kept_or_found(sample, found)) for found in (logp, exact_logp))
    )
    if oracle is None:
        del result["overlap"], result["overlap_random"]
    print(describe(result, dtypes))
    return result | {"float32_weights": sorted(weights)}


def evenly_spread(pairs: Sequence[TokenPair], number: int) -> list[TokenPair]:
    """At most `number` of the pairs, the first and the last among them."""
    return [pairs[i] for i in np.unique(np.linspace(0, len(pairs) - 1, number).astype(int))]


def kept_or_found(sample: Sequence[TokenPair], found: dict[str, list]) -> dict[str, list]:
    """Log-probabilities by role, the reference's as the pairs carry them where no model has any."""
    return found if "reference" in found else {"reference": kept_logp(sample), **found}


def compare_scores(
    found: list[tuple[np.ndarray, np.ndarray]],  # P x chosen (T1,), rejected (T2,), in nats
    exact: list[tuple[np.ndarray, np.ndarray]],  # the same in float32
) -> dict:
    """Error and spread in nats, and the overlap (Jaccard index) of the selected positions.

    Overlap is counted over all responses together, at each of FRACTIONS, chosen highest and
    rejected lowest; "random" beside it is what a random choice would reach on average.
    """
    flat = [np.concatenate([side for pair in pairs for side in pair]) for pairs in (found, exact)]
    error = np.abs(flat[0] - flat[1])
    return {
        "pairs": len(exact),
        "tokens": len(error),
        "error_max": float(error.max()),
        "error_mean": float(error.mean()),
        "spread": float(flat[1].std()),
        "overlap": {str(f): _overlap(found, exact, Selection("selected", f)) for f in FRACTIONS},
        "overlap_random": {str(f): round(f / (2 - f), 3) for f in FRACTIONS},
    }


def _overlap(found: list, exact: list, selection: Selection) -> float:
    common = union = 0
    for pair, other in zip(found, exact, strict=True):
        for side, a, b in zip(("chosen", "rejected"), pair, other, strict=True):
            selected = selection.by_score(a, side)
            shared = len(np.intersect1d(selected, selection.by_score(b, side)))
            common += shared
            union += 2 * len(selected) - shared
    return common / union


def describe(result: dict, dtypes: str) -> str:
    """The comparison in words, for people."""
    quantity = "score" if "overlap" in result else "log-probability"
    lines = [
        f"precision check, {dtypes} against float32 on {result['pairs']} pairs "
        f"({result['tokens']} tokens)",
        f"  {quantity} error: mean {result['error_mean']:.2g}, max {result['error_max']:.2g} nats; "
        f"{quantity} spread: {result['spread']:.2g} nats",
    ]
    if "overlap" in result:
        overlap = ", ".join(f"{v:.2f} at {float(f):.0%}" for f, v in result["overlap"].items())
        lines += [f"  selection overlap (Jaccard): {overlap}", f"  {_verdict(result)}"]
    return "\n".join(lines)


def _verdict(result: dict) -> str:
    jaccard, random = result["overlap"]["0.3"], result["overlap_random"]["0.3"]
    changed = 1 - 2 * jaccard / (1 + jaccard)  # of K selected tokens, those float32 does not select
    share = f"of the tokens selected at 30 %, {changed:.0%} are not the ones float32 selects"
    if changed <= 0.02:
        return f"{share}: good enough."
    if changed <= 0.15:
        return f"{share}: tolerable; float32 is the safe choice."
    return f"{share} (random choice: {1 - 2 * random / (1 + random):.0%}): score in float32."


def difference(logp: dict[str, list]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Oracle minus reference; without an oracle the reference's log-probabilities."""
    if "oracle" not in logp:
        return logp["reference"]
    return [
        (o[0] - r[0], o[1] - r[1]) for o, r in zip(logp["oracle"], logp["reference"], strict=True)
    ]


def _in_float32(model: PreTrainedModel) -> tuple[PreTrainedModel, str]:
    """The model with the weights that its checkpoint holds, before they were rounded to its dtype.

    A model changed in memory has no such checkpoint: its rounded weights are used, and said to be.
    """
    if model.dtype == torch.float32:
        return model, "as loaded"
    exact, path = None, model.name_or_path or ""
    with suppress(InputError):
        exact = load_model(path, dtype=torch.float32, device=model.device)
    if exact is not None and _rounds_to(exact, model):
        return exact, "checkpoint"
    return copy.deepcopy(model).float(), "rounded"


def _rounds_to(exact: PreTrainedModel, model: PreTrainedModel) -> bool:
    others = dict(model.named_parameters())
    return all(
        name in others and torch.equal(parameter.to(others[name].dtype), others[name])
        for name, parameter in exact.named_parameters()
    )
