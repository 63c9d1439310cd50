"""Flex's block mask of one micro-batch, which the host builds before a GPU may begin."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch

import sepo
from bench.contender import Contender
from bench.operations import Case, Inputs
from bench.steps.pairs import drawn_pairs
from sepo.attention import flex


@dataclass(frozen=True)
class MaskCase(Case):
    suite: ClassVar[str] = "attention"
    name: str
    tokens: int
    max_length: int = 1024  # tokens of a prompt and one response
    dtype: torch.dtype = torch.bfloat16  # of the roof beside it

    def inputs(self, device: str) -> "MaskInputs":
        return MaskInputs(self, device)


class MaskInputs(Inputs):
    gradient_bytes, flop = 0, 0.0

    @cached_property
    def spans(self) -> tuple[tuple[int, int, int, int], ...]:
        """Of drawn pairs, the last of which is cut where the tokens end."""
        found, start = [], 0
        for pair in drawn_pairs(self.case.tokens // 8, 2, self.case.max_length):
            sizes = len(pair.prompt), len(pair.chosen), len(pair.rejected)
            bounds = np.minimum(start + np.cumsum((0, *sizes)), self.case.tokens)
            found.append(tuple(bounds.tolist()))
            start = found[-1][-1]
            if start == self.case.tokens:
                break
        return tuple(found)

    @property
    def bytes(self) -> float:
        return float(sum(array.nbytes for array in _build(self).values()))


def _build(inputs: MaskInputs) -> dict[str, np.ndarray]:
    return flex.arrays(inputs.spans, None)


MASK = Contender(
    "sepo:flex mask", _build, ours=True, gated=False, version=lambda: f"sepo {sepo.__version__}",
    note=lambda inputs: f"{len(inputs.spans)} pairs, on the host",
    rate=lambda inputs, seconds: f"{inputs.case.tokens / seconds / 1e6:.1f} million tokens/s",
)  # fmt: skip


def cases(device: str) -> list[MaskCase]:
    return [MaskCase("flex-mask-8k", 8192), MaskCase("flex-mask-32k", 32768)]
