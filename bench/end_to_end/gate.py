"""Nothing is timed whose answer is wrong: loss and gradient against the plainest way, in float32."""

from dataclasses import dataclass

from torch import Tensor

from bench import measure
from bench.end_to_end import savings
from bench.end_to_end.contender import Contender
from bench.end_to_end.objectives import loss, segments
from bench.end_to_end.weights import Weights
from sepo.data.types import ScoredPair

# of the loss, and of the gradient's error over its length: a cosine of 0.9999 would allow 0.014
FLOAT32 = {"loss": 1e-4, "gradient": 1e-3}
# autocast's rounding, in a trunk of thirty layers; a token shifted or left out is an error near 1
BFLOAT16 = {"loss": 0.05, "gradient": 0.1}


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


def truth(objective: str, weights: Weights, pairs: list[ScoredPair]) -> Truth:
    """One padded response a row, the model's own forward, a dense log-softmax, all in float32."""
    found = savings.unpacked(weights.twin(), segments(objective, pairs), pairs)
    value = loss(objective, *found)
    value.backward()
    return Truth(value.item(), weights.take_gradients())


def check(
    contender: Contender, expected: Truth, weights: Weights, limits: dict[str, float]
) -> tuple[str, dict[str, float]]:  # why it is refused or "", errors
    """Round 0 of one contender."""
    try:
        value = contender.step(0)
    except Exception as error:  # a peer may fail in any way; the others are still to be measured
        reason = measure.said(error)
    else:
        reason = ""
    if reason:
        weights.optimizer.zero_grad()
        measure.recover(weights.model.device.type)
        return reason, {}
    gradients = weights.take_gradients()
    if any(gradient is None for gradient in gradients):
        return "a parameter has no gradient", {}
    errors = expected.errors(value, gradients)
    wrong = [
        f"{name} is off by {errors[name]:.2e}, limit {limit:.0e}"
        for name, limit in limits.items()
        if not errors[name] <= limit  # a NaN is wrong
    ]
    return "; ".join(wrong), errors
