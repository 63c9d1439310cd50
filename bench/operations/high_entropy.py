"""A policy gradient on the tokens of the highest entropy: the head of all rows, or of those kept."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import plain
from bench.contender import gradients
from bench.operations.head import HeadCase, LogprobInputs

OPEN = 0.5  # standard deviation of the logits of rows that are kept; others have 1, or are sure
NAMES = ("logp", "entropy")


@dataclass(frozen=True)
class HighEntropyCase(HeadCase):
    share: float = 0.2  # of the rows, that are kept

    @property
    def products(self) -> int:
        """The bare product of all rows: what finds the entropies, whoever does it."""
        return 1

    @property
    def K(self) -> int:
        return math.floor(self.share * self.M + 1e-9)

    def inputs(self, device: str) -> "HighEntropyInputs":
        return HighEntropyInputs(self, device)


class HighEntropyInputs(LogprobInputs):
    """Rows of which a share is clearly the most open: rounding changes no choice."""

    def __init__(self, case: HighEntropyCase, device: str):
        super().__init__(case, device)
        chosen = self.rows[1::2].long()[: case.K]  # none of those that are sure
        self.hidden[chosen] = (OPEN * self.normal(case.K, case.D)).to(case.dtype)

    @property
    def flop(self) -> float:
        """All rows once without a gradient, and three times those that are kept."""
        return (1 + 3 * self.case.share) * super().flop

    def names(self, objective: str) -> tuple[str, ...]:
        return NAMES

    def mask(self, entropy: Tensor) -> Tensor:  # (M,) -> (M,) bool
        kept = entropy.detach().topk(self.case.K).indices
        return torch.zeros_like(entropy, dtype=torch.bool).index_fill_(0, kept, True)

    def values(self, objective: str, z: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        logp, entropy = plain.statistics(z, self.targets)[:2]
        return dict(zip(NAMES, (logp, entropy), strict=True)), self.masked(logp, entropy)

    def masked(self, logp: Tensor, entropy: Tensor) -> Tensor:
        """What a loop that has logp of all rows differentiates."""
        return logp @ (self.upstream * self.mask(entropy)).to(logp.dtype)

    def limits(self, ours: bool, objective: str) -> dict[str, float]:
        found = super().limits(ours, objective)
        return found | {"entropy": found["logp"]}

    def plain(self, gather_first: bool, product=torch.matmul) -> dict[str, Tensor]:
        hidden, weight = self.leaves()
        logits = product(hidden[self.rows.long()], weight.T)
        return self.result(*plain.statistics(logits, self.targets)[:2], hidden, weight)

    def result(self, logp: Tensor, entropy: Tensor, hidden: Tensor, weight: Tensor) -> dict:
        values = {"logp": logp.detach(), "entropy": entropy.detach()}
        return values | gradients(self.masked(logp, entropy), None, hidden, weight)


def cases(device: str) -> list[HighEntropyCase]:
    half, full = torch.bfloat16, torch.float32
    if device == "cuda":
        large = dict(N=8192, response=8192, D=4096, V=128256)
        return [HighEntropyCase("high-entropy-large", 1.0, half, **large)]
    return [
        HighEntropyCase("high-entropy-bf16", 1.0, half),
        HighEntropyCase("high-entropy-fp32", 1.0, full, long=True),
    ]
