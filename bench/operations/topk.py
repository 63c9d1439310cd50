"""segment_topk: the highest (chosen) or lowest (rejected) 30 % of each segment's scores."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from bench.operations import Case, Inputs


@dataclass(frozen=True)
class TopkCase(Case):
    suite: ClassVar[str] = "select"
    name: str
    S: int = 512  # segments
    shortest: int = 50  # tokens
    longest: int = 4000
    fraction: float = 0.3
    dtype: torch.dtype = torch.float32
    products: int = 0

    def inputs(self, device: str) -> "TopkInputs":
        return TopkInputs(self, device)


class TopkInputs(Inputs):
    """Scores in steps of 1/1024 nat, so that segments have ties."""

    gradient_bytes = 0
    flop = 0.0

    def __init__(self, case: TopkCase, device: str):
        super().__init__(case, device)
        g = torch.Generator().manual_seed(0)
        length = torch.randint(case.shortest, case.longest + 1, (case.S,), generator=g)
        cu = torch.nn.functional.pad(length.cumsum(0), (1, 0))
        score = (torch.randn(int(cu[-1]), generator=g) * 1024).round() / 1024
        self.score = score.to(device)  # (T_all,) float32
        self.cu_tokens = cu.int().to(device)  # (S + 1,)

    @property
    def bytes(self) -> float:
        """Scores and offsets; the places chosen and their offsets."""
        chosen = sum(map(self.count, self.cu_tokens.diff().tolist()))
        return self.score.nbytes + 2 * self.cu_tokens.nbytes + 4 * chosen

    def count(self, tokens: int) -> int:
        return max(1, math.floor(self.case.fraction * tokens + 1e-9))

    def each_segment(self, take: Callable) -> tuple[Tensor, Tensor]:  # index (M,), cu_rows (S + 1,)
        """A segment at a time by `take`, of scores, count, highest: even ones highest, odd lowest."""
        cu, index = self.cu_tokens.tolist(), []
        for s, (start, stop) in enumerate(pairwise(cu)):
            taken = take(self.score[start:stop], self.count(stop - start), s % 2 == 0)
            index.append(taken.sort().values + start)
        return torch.cat(index), torch.tensor([0, *accumulate(map(len, index))])

    @cached_property
    def _truth(self) -> tuple[Tensor, Tensor]:
        """Ties to the earlier token."""
        order = lambda score, highest: score.cpu().argsort(stable=True, descending=highest)
        return self.each_segment(lambda score, K, highest: order(score, highest)[:K])

    def due(self, objective: str) -> tuple[str, ...]:
        """What a provider must give to be gated."""
        return ("index", "cu_rows")

    def errors(self, result: dict[str, Tensor], objective: str) -> dict[str, float]:
        """Tokens whose choice is wrong; `objective` "any tie" accepts another token of equal score."""
        index, cu_rows = self._truth
        got, got_cu = result["index"].cpu().long(), result["cu_rows"].cpu().long()
        if got.shape != index.shape or not torch.equal(got_cu, cu_rows):
            return {"wrong": float("inf")}
        if objective == "any tie":
            segment = torch.repeat_interleave(torch.arange(len(cu_rows) - 1), cu_rows.diff())
            score, owner = self.score.cpu(), self.cu_tokens.cpu()[1:].long()
            ranked = lambda chosen: score[chosen][np.lexsort((score[chosen], segment))]
            strayed = torch.searchsorted(owner, got, right=True) != segment
            repeated = len(got) - len(got.unique())
            return {"wrong": float(((ranked(got) != ranked(index)) | strayed).sum() + repeated)}
        return {"wrong": float((got != index).sum())}

    def limits(self, ours: bool, objective: str) -> dict[str, float]:
        return {"wrong": 0.0}


def cases(device: str) -> list[TopkCase]:
    return [TopkCase("topk-30")]
