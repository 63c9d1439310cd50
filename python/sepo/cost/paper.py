"""SePO's Table 1 (arXiv 2408.13518): its setting, and its GPU-hours beside modelled ones.

Known of the setting: UltraFeedback's 61 135 pairs, one epoch, 128 pairs a step, 4 A100 of 80 GB, mean
lengths before and after truncation (its Appendix E). The authors' scripts
(github.com/SteveKGYang/SePO, train_selective_llama.sh) say the rest: ZeRO-3, gradient checkpointing, flash attention, a pair
at a time on each GPU, both responses padded to the longer; its loss takes the log-softmax of every row.
"""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sepo.cost import lengths
from sepo.cost.decoder import Decoder, named
from sepo.cost.gpu import GPUS
from sepo.cost.lengths import Lengths
from sepo.cost.work import Schedule, Work, scaled, step_work
from sepo.errors import InputError
from sepo.trainer.methods import METHODS as METHOD

PAIRS, PAIRS_PER_STEP, NUM_GPUS, A100 = 61_135, 128, 4, GPUS["A100"]
METHODS = ("dpo", "ipo", "rrhf", "simpo", "sepo-rand", "sepo")
FRACTION = 0.3
# prompt and response together: so read, FLOP alone give the 1.75 hours and the ratio of 0.58
MEANS = {"LLaMA": (496, 384), "Pythia": (444, 340)}
PROMPT_SHARE = 0.25  # of the whole sequence; assumed, the paper gives no mean of the prompts
TOKENS_AT_ONCE = 8192  # of our micro-batches

AS_RELEASED = Schedule(packed=False, prompt_once=False, selected=False, checkpointing=True)


@cache
def decoder(model: str) -> Decoder:
    return named(model)


def mean_lengths(model: str) -> tuple[int, int]:  # of a prompt with one response, whole and cut
    return MEANS["Pythia" if model.startswith("Pythia") else "LLaMA"]


def means(model: str) -> tuple[float, float, float]:
    """Tokens of a prompt, a response, a truncated response."""
    whole, cut = mean_lengths(model)
    prompt = PROMPT_SHARE * whole
    return prompt, whole - prompt, cut - prompt


@cache
def data(model: str, spread: float = lengths.SPREAD) -> Lengths:
    return lengths.from_means(*means(model), pairs=PAIRS, spread=spread)


def epoch(
    model: str,
    method: str,
    schedule: Schedule,
    *,
    truncated: bool = True,  # methods that use all tokens have nothing to cut
    spread: float = lengths.SPREAD,
) -> Work:
    """All pairs once, on the paper's GPUs."""
    pairs, positions = data(model, spread), METHOD[method].positions
    sizes = pairs.whole
    if truncated and positions == "selected":
        sizes = pairs.cut
    if truncated and positions == "random":
        sizes = lengths.drawn_at_random(pairs, FRACTION)
    everything = positions == "all"
    rows = pairs.whole[:, 1:].sum() if everything else pairs.selected(FRACTION)
    if METHOD[method].reference and schedule.reference == "none":
        schedule = replace(schedule, reference="live")
    work = step_work(
        decoder(model), sizes, rows, schedule,
        pairs_at_once=1, tokens_at_once=TOKENS_AT_ONCE, gathered_over=NUM_GPUS,
        steps=len(sizes) / PAIRS_PER_STEP, memory=A100.memory,
    )  # fmt: skip
    return scaled(work, pairs.scale)


def sepo_hours_at_full_rate(model: str) -> float:
    """GPU-hours for the layers' products on SePO's tokens, forward and backward, and nothing else."""
    tokens = 2 * PAIRS * mean_lengths(model)[1]
    return 6 * decoder(model).weights * tokens / A100.flop / 3600


def flop_ratio(model: str) -> float:
    """SePO over DPO: three passes over the truncated against four over the whole responses."""
    whole, cut = mean_lengths(model)
    return 3 * cut / (4 * whole)


class Comparison(NamedTuple):
    """Of modelled hours with published ones."""

    figures: int
    left_out: int  # figures of models or methods that were not modelled
    rank_correlation: float  # Spearman's
    ratios: dict[str, dict[str, tuple[float, float]]]  # "SePO/DPO": {model: (modelled, published)}

    def error(self, ratio: str) -> float:
        """Median of |modelled / published - 1|."""
        found = [abs(ours / theirs - 1) for ours, theirs in self.ratios[ratio].values()]
        return float(np.median(found)) if found else float("nan")


def read_figures(path: Path) -> dict[str, dict[str, float]]:
    """GPU-hours by model and method. Raises InputError for no such file and for another form.

    {"source": address, "hours": {"LLaMA3-8B": {"dpo": 1.0, ...}, ...}}
    """
    try:
        found = json.loads(path.read_text())
        hours = {
            model: {method: float(value) for method, value in row.items()}
            for model, row in found["hours"].items()
        }
        source = found["source"]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: expected source, and hours by model and method") from error
    if not source:
        raise InputError(f"{path}: expected source, where the figures were read")
    return hours


def compare(
    modelled: dict[str, dict[str, float]],  # nothing that is not published
    published: dict[str, dict[str, float]],
) -> Comparison:
    both = [
        (modelled[model][method], published[model][method])
        for model, row in modelled.items()
        for method in row
    ]
    ratios = {
        f"SePO/{name}": {
            model: (row["sepo"] / row[method], published[model]["sepo"] / published[model][method])
            for model, row in modelled.items()
            if {"sepo", method} <= row.keys()
        }
        for name, method in (("DPO", "dpo"), ("SimPO", "simpo"))
    }
    correlation = float(np.corrcoef([ranks(column) for column in zip(*both, strict=True)])[0, 1])
    left_out = sum(map(len, published.values())) - len(both)
    return Comparison(len(both), left_out, correlation, ratios)


def ranks(values) -> np.ndarray:  # (n,) from 0; equal values share the mean of their places
    values = np.asarray(values)
    return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])
