"""Do the selected tokens belong to words that the judge knows? The oracle never saw its lexicon."""

from collections.abc import Sequence

import numpy as np

from sepo.data.types import CutPair, TokenPair
from sepo.demo.judge import lexicon_tokens


def selection_lift(
    pairs: Sequence[TokenPair],
    selected: Sequence[CutPair],  # the same pairs, positions by score
    random: Sequence[CutPair],  # the same pairs, as many positions at random
    tokenizer,
) -> dict[str, float]:
    """Lexicon rates: the share of tokens that belong to a word of the judge's lexicon.

    `lift` is the rate of the selected tokens over the rate of all response tokens.
    """
    known = [
        [in_lexicon(response, tokenizer) for response in (pair.chosen, pair.rejected)]
        for pair in pairs
    ]
    everywhere = np.concatenate([flags for sides in known for flags in sides]).mean()
    rate = lambda segments: np.concatenate(
        [
            flags[side.positions]
            for sides, (_, *responses) in zip(known, segments, strict=True)
            for flags, side in zip(sides, responses, strict=True)
        ]
    ).mean()
    by_score, by_chance = rate(selected), rate(random)
    return {
        "lexicon_rate_selected": round(float(by_score), 4),
        "lexicon_rate_all": round(float(everywhere), 4),
        "lift": round(float(by_score / everywhere), 3),
        "lift_random": round(float(by_chance / everywhere), 3),
    }


def in_lexicon(response: np.ndarray, tokenizer) -> np.ndarray:  # (T,) int32 -> (T,) bool
    """For each token of a response, whether it belongs to a word of the lexicon."""
    # the text that each prefix decodes to tells where each token ends, whatever the tokenizer
    ends = [len(tokenizer.decode(response[: t + 1])) for t in range(len(response))]
    offsets = list(zip([0, *ends], ends, strict=False))
    return np.array(lexicon_tokens(tokenizer.decode(response), offsets))
