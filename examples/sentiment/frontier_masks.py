"""What SparsePO's learned masks weigh: words that the judge knows, or any others alike?"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sepo.data import all_positions, pack, truncate
from sepo.data.types import TokenPair
from sepo.demo.lexicon import in_lexicon
from sepo.masks import layer_states, load_mask

DRAWS = 2000  # of the bootstrap


@torch.no_grad()
def mask_words(
    folder: Path,  # where the trainer saved the mask
    reference: PreTrainedModel,  # prepared: its states are what the mask reads
    pairs: list[TokenPair],
    tokenizer,
) -> dict[str, dict]:
    """For both masks: sparsity, and the mean on tokens of lexicon words over that on other tokens.

    The 95 % interval of the ratio is a bootstrap over pairs. A common mask is reported once.
    """
    mask = load_mask(folder).to(reference.device)
    values = {"reward": [], "kl": []}
    for pair in pairs:
        both = mask(states_of(reference, pair))
        common = both[0] is both[1]
        for name, of_pair in zip(values, both, strict=True):
            values[name].append(of_pair.cpu().numpy())
    known = [np.concatenate(words(pair, tokenizer)) for pair in pairs]
    return {
        name: summary(of_pairs, known)
        for name, of_pairs in values.items()
        if name == "reward" or not common
    }


def states_of(reference: PreTrainedModel, pair: TokenPair) -> Tensor:
    """(L, T, D): a layer's state at the row that predicts a token; the chosen's, the rejected's."""
    whole = (truncate(side, all_positions(len(side))) for side in (pair.chosen, pair.rejected))
    return layer_states(reference, pack([(pair.prompt, *whole)]).to(reference.device))[1]


def words(pair: TokenPair, tokenizer) -> list[np.ndarray]:  # (T,) bool, chosen and rejected
    return [in_lexicon(side, tokenizer) for side in (pair.chosen, pair.rejected)]


def summary(
    masks: list[np.ndarray],  # a pair: (T,) float32 >= 0
    known: list[np.ndarray],  # a pair: (T,) bool
) -> dict:
    pairs = list(zip(masks, known, strict=True))
    # (pairs, 4): sum and number over words of the lexicon, sum and number over other tokens
    sums = np.array([[m[k].sum(), k.sum(), m[~k].sum(), (~k).sum()] for m, k in pairs], np.float64)
    draws = np.random.default_rng(0).integers(0, len(pairs), (DRAWS, len(pairs)))
    resampled = np.array([ratio(sums[draw].sum(0)) for draw in draws])
    everything = np.concatenate(masks)
    words, word_count, others, other_count = sums.sum(0).tolist()
    return {
        "sparsity": float((everything == 0).mean()),
        "mean_words": words / max(word_count, 1),
        "mean_others": others / max(other_count, 1),
        "ratio": finite(ratio(sums.sum(0))),
        "ratio_ci95": [finite(q) for q in np.quantile(resampled, (0.025, 0.975))],
    }


def ratio(sums: np.ndarray) -> float:  # (4,) as above; NaN where a side has no tokens or no mask
    words, word_count, others, other_count = sums
    if not word_count or not others:
        return float("nan")
    return float((words / word_count) / (others / other_count))


def finite(value: float) -> float | None:  # JSON has no NaN
    return float(value) if np.isfinite(value) else None
