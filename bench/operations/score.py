"""A pass of `sepo score`: one model's log-probability of every response token of drawn pairs."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial
from typing import ClassVar

import numpy as np
import torch
from transformers import PreTrainedModel

import sepo
from bench.contender import Contender
from bench.operations import Case, Inputs
from bench.steps import models
from bench.steps.pairs import drawn_pairs
from sepo.cost.decoder import Decoder
from sepo.cost.work import forward_work, needed_flop
from sepo.score.logp import response_logp
from sepo.score.products import SplitProducts, why_slow


@dataclass(frozen=True)
class ScoreCase(Case):
    suite: ClassVar[str] = "score"
    kept: ClassVar[bool] = True  # a model is not loaded twice
    name: str
    model: str  # of models.SHAPES
    pairs: int
    max_length: int = 512  # tokens of a prompt and one response
    max_tokens: int = 8192  # of a batch
    dtype: torch.dtype = torch.float32  # of the model

    def inputs(self, device: str) -> "ScoreInputs":
        return ScoreInputs(self, device)


class ScoreInputs(Inputs):
    gradient_bytes = 0

    @cached_property
    def model(self) -> PreTrainedModel:
        return models.load(self.case.model, self.device)[0].eval()

    @cached_property
    def pairs(self) -> list:
        vocabulary = self.model.config.vocab_size
        return drawn_pairs(self.case.pairs, vocabulary, self.case.max_length)

    @cached_property
    def halves(self) -> SplitProducts:
        return SplitProducts(self.model, "split")

    @cached_property
    def rounded(self) -> PreTrainedModel:  # as a checkpoint in bfloat16 is read
        model = deepcopy(self.model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        return model

    @cached_property
    def halves_of_two(self) -> SplitProducts:
        return SplitProducts(self.rounded, "split")

    @property
    def tokens(self) -> int:
        return sum(map(len, self.pairs))

    @property
    def flop(self) -> float:
        sizes = np.array([(len(p.prompt), len(p.chosen), len(p.rejected)) for p in self.pairs])
        return needed_flop(forward_work(Decoder.of(self.model), sizes, sizes[:, 1:].sum()))

    @property
    def bytes(self) -> float:  # weights, once: more batches read them again
        return float(models.num_bytes(self.model))


Way = Callable[[ScoreInputs], tuple[PreTrainedModel, SplitProducts | None]]


def _scored(way: Way, inputs: ScoreInputs) -> dict:
    model, products = way(inputs)
    response_logp(model, inputs.pairs, "model", inputs.case.max_tokens, products=products)
    return {}


def _contender(name: str, way: Way, why_not: Callable[[ScoreInputs], str]) -> Contender:
    return Contender(
        f"sepo:{name}", partial(_scored, way), why_not=why_not, ours=True, gated=False,
        version=lambda: f"sepo {sepo.__version__}",
        note=lambda inputs: f"{inputs.tokens} tokens of {len(inputs.pairs)} pairs",
        rate=lambda inputs, seconds: f"{inputs.tokens / seconds:.0f} tokens/s",
    )  # fmt: skip


def _why_slow(inputs: ScoreInputs) -> str:
    return why_slow("split", torch.device(inputs.device)) or ""


SCORE = (
    _contender("float32", lambda inputs: (inputs.model, None), lambda inputs: ""),
    _contender("split", lambda inputs: (inputs.model, inputs.halves), _why_slow),
    _contender("split_two", lambda inputs: (inputs.rounded, inputs.halves_of_two), _why_slow),
)


def cases(device: str) -> list[ScoreCase]:
    if device == "cuda":
        return [ScoreCase("score-llama-1b", "llama-1b-shape", 16)]
    return [ScoreCase("score-smollm2", "smollm2-shape", 4)]
