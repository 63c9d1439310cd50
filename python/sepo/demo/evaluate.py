"""Measure what the demo reports of a policy: sentiment, distance from the reference, pair accuracy.

Nothing here uses the packed training path, so an error there cannot flatter its own result.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sepo.data.types import TokenPair
from sepo.demo.judge import sentiment
from sepo.demo.sample import Completion

NORMAL_95 = 1.959964  # two-sided 95 % quantile of the standard normal distribution
ROWS = 512  # rows of logits alive at once: 100 MB in float32 for 49,152 tokens

Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]  # prompt ids, response ids


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.high - self.mean:.3f}"

    def above(self, other: "Estimate") -> bool:
        """Is this interval wholly above the other?"""
        return self.low > other.high


def clustered_mean(
    values: Sequence[float],
    clusters: Sequence[int],  # the opening of each value
) -> Estimate:
    """The mean over clusters of their means, with a normal 95 % interval.

    Samples of one opening resemble each other. Counting them as independent would give an interval
    that is too narrow, so the opening is the unit: its mean is one observation. At least two
    clusters are needed for an interval (ValueError).
    """
    by_cluster = defaultdict(list)
    for value, cluster in zip(values, clusters, strict=True):
        by_cluster[cluster].append(value)
    if len(by_cluster) < 2:
        raise ValueError(f"expected at least 2 clusters, got {len(by_cluster)}")
    means = [fmean(group) for group in by_cluster.values()]
    half = NORMAL_95 * stdev(means) / sqrt(len(means))
    return Estimate(fmean(means), fmean(means) - half, fmean(means) + half)


def mean_sentiment(completions: Sequence[Completion]) -> Estimate:
    """Mean compound sentiment (-1 to 1) of the completions, openings as clusters."""
    return clustered_mean(
        [sentiment(c.text) for c in completions], [c.opening for c in completions]
    )


def kl_per_token(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    completions: Sequence[Completion],  # sampled from the policy at temperature 1
    *,
    per_opening: int = 2,  # completions read of each opening, the first ones
    batch_size: int = 16,
) -> Estimate:
    """KL(policy || reference) of the next-token distribution, in nats, per token the policy wrote.

    Each term is summed over the whole vocabulary rather than estimated from the sampled token;
    only the prefixes are samples. The estimate and its clusters are over openings.
    """
    taken = first_of_each(completions, per_opening)
    kl = token_kl(policy, reference, taken, batch_size=batch_size)
    return clustered_mean(
        [value for values in kl for value in values.tolist()],
        [c.opening for c, values in zip(taken, kl, strict=True) for _ in values],
    )


def first_of_each(
    completions: Sequence[Completion],
    per_opening: int,
) -> list[Completion]:
    """The first completions of every opening; an empty one has no tokens and is passed over."""
    taken: list[Completion] = []
    count: Counter[int] = Counter()  # by opening
    for completion in completions:
        if completion.ids and count[completion.opening] < per_opening:
            taken.append(completion)
            count[completion.opening] += 1
    return taken


def token_kl(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    completions: Sequence[Completion],  # sampled from the policy at temperature 1, none empty
    *,
    batch_size: int = 16,
) -> list[Tensor]:
    """KL(policy || reference) in nats at every token of each completion, (T,) float32."""
    sequences = [(c.prompt_ids, c.ids) for c in completions]
    result: list[Tensor] = [torch.empty(0)] * len(completions)
    both = zip(
        response_rows(policy, sequences, batch_size),
        response_rows(reference, sequences, batch_size),
        strict=True,
    )
    for (members, policy_rows), (_, reference_rows) in both:
        chunks = zip(policy_rows.split(ROWS), reference_rows.split(ROWS), strict=True)
        kl = torch.cat([row_kl(policy, a, reference, b) for a, b in chunks])
        parts = kl.split([len(completions[i].ids) for i in members])
        for i, part in zip(members, parts, strict=True):
            result[i] = part
    return result


@torch.no_grad()
def row_kl(
    policy: PreTrainedModel,
    policy_rows: Tensor,  # (M, D)
    reference: PreTrainedModel,
    reference_rows: Tensor,  # (M, D')
) -> Tensor:
    """KL(policy || reference) at each row, (M,) float32 nats."""
    log_p = policy.get_output_embeddings()(policy_rows).float().log_softmax(-1)
    log_q = reference.get_output_embeddings()(reference_rows).float().log_softmax(-1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def pair_accuracy(
    model: PreTrainedModel,
    pairs: Sequence[TokenPair],
    *,
    batch_size: int = 16,
    dtype: torch.dtype = torch.float32,  # of the trunk's products
) -> Estimate:
    """`chosen_wins` by what the model says of the pairs."""
    sequences = [(p.prompt.tolist(), r.tolist()) for p in pairs for r in (p.chosen, p.rejected)]
    logp = response_logp(model, sequences, batch_size=batch_size, dtype=dtype)
    return chosen_wins(logp[::2], logp[1::2])


def chosen_wins(
    chosen: Sequence[Tensor | np.ndarray],  # (T,) log-probabilities of each pair's tokens
    rejected: Sequence[Tensor | np.ndarray],
) -> Estimate:
    """The share of pairs whose chosen response has the higher mean log-probability per token."""
    right = [float(c.mean() > r.mean()) for c, r in zip(chosen, rejected, strict=True)]
    return clustered_mean(right, range(len(right)))


@torch.no_grad()
def response_logp(
    model: PreTrainedModel,
    sequences: Sequences,
    *,
    batch_size: int = 16,
    dtype: torch.dtype = torch.float32,  # of the trunk's products; the head's are float32
) -> list[Tensor]:
    """log p(y_t | x, y_<t) in nats for each response, (T,) float32, in the order given."""
    result: list[Tensor] = [torch.empty(0)] * len(sequences)
    for members, rows in response_rows(model, sequences, batch_size, dtype):
        targets = [sequences[i][1] for i in members]
        flat = torch.tensor([t for ids in targets for t in ids], device=rows.device)
        logp = torch.cat(
            [
                -torch.nn.functional.cross_entropy(
                    model.get_output_embeddings()(chunk).float(), target, reduction="none"
                )
                for chunk, target in zip(rows.split(ROWS), flat.split(ROWS), strict=True)
            ]
        )
        for i, part in zip(members, logp.split([len(ids) for ids in targets]), strict=True):
            result[i] = part
    return result


@torch.no_grad()
def response_rows(
    model: PreTrainedModel,
    sequences: Sequences,  # no prompt and no response may be empty
    batch_size: int,
    dtype: torch.dtype = torch.float32,  # of the trunk's products
) -> Iterator[tuple[list[int], Tensor]]:
    """Batches of (indices into `sequences`, the rows (sum of T, D) that predict their responses)."""
    lengths = [len(prompt) + len(response) for prompt, response in sequences]
    order = sorted(range(len(sequences)), key=lambda i: lengths[i])
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        # Padded on the right and left unmasked: a causal model cannot see what comes later.
        ids = torch.zeros(len(members), lengths[members[-1]] - 1, dtype=torch.long)
        for row, i in enumerate(members):
            prompt, response = sequences[i]
            ids[row, : lengths[i] - 1] = torch.tensor([*prompt, *response][:-1])
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            out = model.get_decoder()(ids.to(model.device), use_cache=False)
        hidden = out.last_hidden_state.to(model.dtype)
        yield (
            members,
            torch.cat(
                [
                    hidden[row, len(sequences[i][0]) - 1 : lengths[i] - 1]
                    for row, i in enumerate(members)
                ]
            ),
        )
