"""Log-probabilities in one arithmetic or another, and what selections made of them share."""

import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from examples.precision.arithmetic import Float64Only, tf32
from sepo.data.selection import random_positions, select_positions
from sepo.data.types import TokenPair
from sepo.demo import evaluate
from sepo.model.load import load_model
from sepo.model.prepare import prepare_model
from sepo.score.logp import response_logp
from sepo.score.products import HALVES, SplitProducts

MAX_TOKENS = 1024  # of a batch
# what a user may do: the arithmetic of the oracle's pass, that of the reference's
VARIANTS = {
    "float32": ("float32", "float32"),
    "split": ("split", "split"),  # of bfloat16 halves: `sepo score --arithmetic split`
    "split bfloat16 weights": ("split bfloat16 weights", "split bfloat16 weights"),
    "tf32": ("tf32", "tf32"),
    "float16": ("float16", "float16"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "bfloat16 logits": ("bfloat16 logits", "bfloat16 logits"),  # and softmax of rounded logits
    "bfloat16 weights": ("bfloat16 weights", "bfloat16 weights"),  # arithmetic in float32
    "bfloat16 oracle checkpoint": ("bfloat16 weights", "float32"),  # the reference's is exact
}
# by variant, where it is not float64 of the checkpoints as they are: what two products of halves
# make of checkpoints in bfloat16 is compared with float64 of the same
TRUTHS = {"split bfloat16 weights": "float64 bfloat16 weights"}
FRACTIONS = (0.1, 0.5)  # beside the study's own
ROUNDED = "bfloat16 weights"  # at the end of an arithmetic's name: weights rounded first

Responses = list[tuple[np.ndarray, np.ndarray]]  # P x chosen (T1,), rejected (T2,), in nats
Positions = list[tuple[np.ndarray, np.ndarray]]  # P x chosen (K1,), rejected (K2,)


def measure(
    variant: str,  # of VARIANTS, or "random"
    pairs: list[TokenPair],
    oracle: Path,
    reference: Path,
    cache: Path,  # directory of log-probabilities
    fraction: float,
) -> dict:
    """What `variant` keeps of the selection made in float64, and its scores' error."""
    truth = TRUTHS.get(variant, "float64")
    exact = token_scores((truth, truth), pairs, oracle, reference, cache)
    true = select(exact, fraction)
    flat = np.concatenate([side for pair in exact for side in pair])
    result = {"pairs": len(pairs), "tokens": len(flat), "spread": float(flat.std())}
    if variant == "random":
        return result | compare(true, select_at_random(pairs, fraction))
    found = token_scores(VARIANTS[variant], pairs, oracle, reference, cache)
    error = np.abs(np.concatenate([side for pair in found for side in pair]) - flat)
    result |= {"error_mean": float(error.mean()), "error_max": float(error.max())}
    logps = [cached_logp(oracle, name, pairs, cache) for name in (VARIANTS[variant][0], truth)]
    result |= {"logp_error_mean": float(np.abs(logps[0] - logps[1]).mean())}
    kept_at = {
        str(f): compare(select(exact, f), select(found, f))["kept"] for f in (*FRACTIONS, fraction)
    }
    return result | {"kept_at": kept_at} | compare(true, select(found, fraction))


def compare(true: Positions, found: Positions) -> dict:
    """Shares of the tokens selected in truth and in fact, with 95 % intervals over pairs.

    "kept": of a pair's true selection, the share that is found; "jaccard": of all tokens that
    either selects, the share that both do. Means over pairs.
    """
    kept, jaccard = [], []
    for a, b in zip(true, found, strict=True):
        shared = sum(len(np.intersect1d(x, y)) for x, y in zip(a, b, strict=True))
        size = sum(map(len, a))
        kept.append(shared / size)
        jaccard.append(shared / (size + sum(map(len, b)) - shared))
    result = {}
    for name, values in (("kept", kept), ("jaccard", jaccard)):
        mean = evaluate.clustered_mean(values, range(len(values)))
        result |= {name: mean.mean, f"{name}_ci95": [mean.low, mean.high]}
    return result


def select(scores: Responses, fraction: float) -> Positions:
    """SePO's selection: the highest of a chosen response, the lowest of a rejected one."""
    return [
        (
            select_positions(chosen, fraction, "highest"),
            select_positions(rejected, fraction, "lowest"),
        )
        for chosen, rejected in scores
    ]


def select_at_random(pairs: list[TokenPair], fraction: float) -> Positions:
    draw = lambda pair, side: random_positions(
        len(getattr(pair, side)), fraction, seed=0, key=f"{pair.id}/{side}"
    )
    return [(draw(pair, "chosen"), draw(pair, "rejected")) for pair in pairs]


def token_scores(
    arithmetics: tuple[str, str],  # of the oracle's pass and of the reference's
    pairs: list[TokenPair],
    oracle: Path,
    reference: Path,
    cache: Path,
) -> Responses:
    """Oracle minus reference log-probability of each response token."""
    logps = [
        cached_logp(model, arithmetic, pairs, cache)
        for model, arithmetic in zip((oracle, reference), arithmetics, strict=True)
    ]
    ends = np.cumsum([n for p in pairs for n in (len(p.chosen), len(p.rejected))])
    sides = np.split(logps[0] - logps[1], ends[:-1])
    return list(zip(sides[::2], sides[1::2], strict=True))


def cached_logp(model: Path, arithmetic: str, pairs: list[TokenPair], cache: Path) -> np.ndarray:
    """log p of every response token, chosen and rejected of each pair in order; made once."""
    path = cache / f"{model.name}, {arithmetic}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        flat = np.concatenate([side for pair in logp(model, arithmetic, pairs) for side in pair])
        unfinished = path.with_suffix(".unfinished.npy")
        np.save(unfinished, flat)
        os.replace(unfinished, path)
    return np.load(path)


def logp(path: Path, arithmetic: str, pairs: list[TokenPair]) -> Responses:
    """log p of every response token in nats; float64 for "float64", else float32."""
    rounded, name = arithmetic.endswith(ROUNDED), arithmetic.removesuffix(ROUNDED).strip()
    if name == "float64":
        with Float64Only():  # the definition
            return _transformers_logp(path, pairs, torch.float64, rounded)
    if name == "bfloat16 logits":
        return _transformers_logp(path, pairs, torch.bfloat16)
    own = getattr(torch, name, None)  # of weights and arithmetic alike; torch.split is none
    dtype = own if isinstance(own, torch.dtype) else torch.float32
    model = prepare_model(load_model(str(path), dtype=dtype))  # before anything is emulated
    if rounded:
        _round(model)
    if name in HALVES:
        halves = SplitProducts(model, name)
        return response_logp(model, pairs, "model", MAX_TOKENS, products=halves)
    with tf32() if name == "tf32" else nullcontext():
        return response_logp(model, pairs, "model", MAX_TOKENS)


def _transformers_logp(
    path: Path, pairs: list[TokenPair], dtype: torch.dtype, rounded: bool = False
) -> Responses:
    """transformers' own forward and logits, each response a sequence of its own."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    if rounded:
        _round(model)
    sequences = [(p.prompt.tolist(), r.tolist()) for p in pairs for r in (p.chosen, p.rejected)]
    values = [v.numpy() for v in evaluate.response_logp(model, sequences, batch_size=4)]
    return list(zip(values[::2], values[1::2], strict=True))


@torch.no_grad()
def _round(model: torch.nn.Module) -> None:
    """Round weights as a bfloat16 checkpoint does."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
