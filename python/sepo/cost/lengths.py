"""Lengths of a data set of which only the means are known."""

from dataclasses import dataclass

import numpy as np

from sepo.errors import InputError

SPREAD = 0.6  # standard deviation of a length's logarithm, assumed
SAMPLE = 4096  # pairs drawn in its place; every sum is scaled up


@dataclass(frozen=True)
class Lengths:
    """Tokens of each pair. `cut` is what is read where nothing after the last selected is."""

    whole: np.ndarray  # (P, 3) float64: prompt, chosen, rejected
    cut: np.ndarray  # (P, 3)
    pairs: float  # of the data set they stand for

    @property
    def scale(self) -> float:
        return self.pairs / len(self.whole)

    def selected(self, fraction: float) -> float:
        """Tokens that the loss uses, of the pairs drawn: fraction of both responses."""
        return float(np.maximum(1, np.floor(fraction * self.whole[:, 1:] + 1e-9)).sum())


def from_means(
    prompt: float,
    response: float,
    cut: float | None = None,  # of a response, after truncation; None: not truncated
    *,
    pairs: float,
    spread: float = SPREAD,
    sample: int = SAMPLE,
) -> Lengths:
    """Log-normal lengths with these means, chosen and rejected alike; a cut one is in proportion."""
    cut = response if cut is None else cut
    if not (prompt >= 1 and response >= 1 and 0 <= cut <= response):
        raise InputError(
            "mean lengths: expected a prompt and a response of at least 1 token, cut to no more "
            f"than the response, got {prompt:g}, {response:g}, {cut:g}"
        )
    draw = np.random.default_rng(0).lognormal(-(spread**2) / 2, spread, (sample, 3))
    draw /= draw.mean(0)  # the means are known, the rest is not
    whole = draw * (prompt, response, response)
    return Lengths(whole, whole * (1, cut / response, cut / response), pairs)


def drawn_at_random(lengths: Lengths, fraction: float) -> np.ndarray:  # (P, 3)
    """Expect what is read where as many tokens are drawn: up to the last one's place."""
    prompt, *responses = lengths.whole.T
    keep = lambda tokens, k: tokens - (tokens - k) / (k + 1)
    counts = [np.maximum(1, np.floor(fraction * tokens)) for tokens in responses]
    return np.stack([prompt, *(keep(t, k) for t, k in zip(responses, counts, strict=True))], 1)
