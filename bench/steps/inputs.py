"""What the contenders of a whole step share: weights, rounds, and what is right of round 0."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench import measure
from bench.contender import Contender
from bench.harness import Row
from bench.steps.models import Weights
from sepo.cost import gpu as gpus

# of the loss, and of the gradient's error over its length: a cosine of 0.9999 would allow 0.014
FLOAT32 = {"loss": 1e-4, "gradient": 1e-3, "cosine": None}
# autocast's rounding, in a trunk of thirty layers; a token shifted or left out is an error near 1
BFLOAT16 = {"loss": 0.05, "gradient": 0.1, "cosine": None}


@dataclass(frozen=True)
class Truth:
    loss: float
    gradients: list[Tensor]

    def errors(self, loss: Tensor, gradients: list[Tensor]) -> dict[str, float]:
        """Of the loss, of the gradient relative to its length, and the gradient's cosine."""
        dot = mine = true = off = 0.0
        for found, expected in zip(gradients, self.gradients, strict=True):
            a, b = found.flatten(), expected.flatten()
            dot += (a @ b).item()
            mine, true = mine + (a @ a).item(), true + (b @ b).item()
            off += (a - b).square_().sum().item()
        return {
            "loss": abs(loss.item() - self.loss),
            "gradient": (off / true) ** 0.5,
            "cosine": dot / (mine * true) ** 0.5 if mine else 0.0,
        }


@dataclass
class Steps:
    """As the harness takes inputs; round 0 is the gate's."""

    contenders: Sequence[Contender]
    weights: Weights
    rounds: list[list]
    truth_of: Callable[[str, Weights, list], Truth]  # objective, weights, pairs
    dtype: torch.dtype = torch.bfloat16  # that is timed
    about: dict = field(default_factory=dict)  # of every row in a file
    heading: str = ""  # of the table
    number: int = 0  # of the round
    _truth: tuple[str, Truth | None] = ("", None)

    def passes(self, contender: Contender) -> Iterator[tuple[tuple[str, ...], dict]]:
        """In float32, then lowered; where float32 is timed what is timed is compared, once."""
        if self.dtype == torch.float32:
            contender.lower()
            yield ("float32_errors", "errors"), FLOAT32
            return
        if contender.float32:
            yield ("float32_errors",), FLOAT32
        contender.lower()
        yield ("errors",), BFLOAT16

    def result_of(self, contender: Contender) -> dict:
        """Of round 0."""
        self.truth(contender.objective)  # whose gradients are not to meet the contender's
        found = {"loss": contender.run(0)}
        gradients = self.weights.take_gradients()
        if all(gradient is not None for gradient in gradients):
            found["gradient"] = gradients
        return found

    def truth(self, objective: str) -> Truth:
        """The last one alone is kept: it is as large as the model."""
        if self._truth[0] != objective:
            self._truth = "", None
            self._truth = objective, self.truth_of(objective, self.weights, self.rounds[0])
        return self._truth[1]

    def due(self, objective: str) -> tuple[str, ...]:
        return "loss", "gradient"

    def errors(self, result: dict, objective: str) -> dict[str, float]:
        return self.truth(objective).errors(result["loss"], result["gradient"])

    def ready(self, contender: Contender, row: Row) -> int | None:  # its rounds; None: all
        """Memory of the longest round, with gradients there already: they are not the contender's."""
        self._truth = "", None
        rounds, device = range(1, len(self.rounds)), self.weights.model.device.type
        longest = max(rounds, key=lambda number: contender.work(number).tokens)
        for parameter in self.weights.parameters:
            parameter.grad = parameter.new_zeros(parameter.shape)
        peak = measure.peak_bytes(lambda: contender.run(longest), device)
        row.peak_bytes = peak / len(self.rounds[longest])
        row.total_bytes = peak + self.weights.static_bytes + contender.keeps_bytes
        self.weights.finish()  # so that the optimiser has its states before anything is timed
        return contender.rounds

    def call(self, contender: Contender) -> Callable[[], None]:
        """Gradients, clipping and AdamW, on the round's pairs."""
        return lambda: (contender.run(self.number), self.weights.finish())

    def scaled(self, seconds: list[float]) -> list[float]:  # a pair
        return [t / len(pairs) for t, pairs in zip(seconds, self.rounds[1:], strict=False)]

    def describe(self, contender: Contender, row: Row, rounds: int) -> None:
        """The work of a pair: of all rounds, so that all rows have the same."""
        done = self.rounds[1 : 1 + rounds]
        each, pairs = [contender.work(n + 1) for n in range(rounds)], sum(map(len, done))
        row.tokens = sum(w.tokens for w in each) / pairs
        row.rows = sum(w.rows for w in each) / pairs
        row.flop = sum(w.flops for w in each) / pairs
        # weights read forward and backward; gradients written and read, both moments read and
        # written, weights read and written
        row.bytes = self.weights.static_bytes / 4 * (2 + 2 + 4 + 2) * rounds / pairs
        if row.seconds and (gpu := gpus.here()):
            timed = len(row.seconds)
            spent = sum(t * len(p) for t, p in zip(row.seconds, done, strict=False))
            row.mfu = sum(w.flops for w in each[:timed]) / spent / gpu.flop

    def forget(self) -> None:
        self.weights.optimizer.zero_grad()
