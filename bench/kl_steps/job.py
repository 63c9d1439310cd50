"""A TDPO2 or a SparsePO step beside full softmaxes of both models, as the run takes it."""

from bench.end_to_end import models, table
from bench.end_to_end.contender import Contender
from bench.end_to_end.job import Setting, StepJob
from bench.end_to_end.weights import Weights
from bench.kl_steps import dense, ours
from bench.kl_steps.settings import SETTINGS
from sepo.trainer.step import MASK

LEAST = 3.0  # times as fast, and times less memory


class KLJob(StepJob):
    """One method; weights, rounds and rows are those of the other races."""

    METHODS = tuple(SETTINGS)

    def __init__(self, method: str, setting: Setting, wanted: tuple[str, ...] = ()):
        super().__init__(f"step-{method}", setting, wanted)
        self.method = self.base = method

    def _truth(self) -> dict:
        return dict(truth=dense.truth)

    def _pairs(self, weights: Weights, tokenizer) -> tuple[list, str]:
        own, V = self.setting, weights.model.config.vocab_size
        return models.pairs(own.data, tokenizer, V, own.max_length, own.pairs * own.rounds)

    def _with_reference(self, weights: Weights, rounds: list[list]) -> list[list]:
        return rounds  # each contender has its own way to the reference

    def _contenders(self, weights: Weights, rounds: list, tokenizer) -> list[Contender]:
        if self.method == "sparsepo":
            weights.add(MASK, ours.new_mask(weights))
        options = dict(bf16=not self.setting.float32)
        return [
            *dense.contenders(self.method, weights, rounds, **options),
            *ours.contenders(self.method, weights, rounds, **options),
        ]

    def _bars(self) -> str:
        return table.bars(self.rows, *bars(self.method))


def bars(method: str) -> tuple[table.Bars, table.Bars]:
    """Faster, and smaller, than the straightforward step by at least LEAST."""
    dense_step, found = f"dense {method}", [method, f"{method}, cheap again"]
    if method == "tdpo2":  # a mask reads the reference's layers, which no store keeps
        found.insert(1, "tdpo2, cached rows")
    faster = tuple((name, dense_step, LEAST) for name in found)
    return faster, (
        *faster,
        (f"{method}, checkpointing", f"{dense_step}, checkpointing", LEAST),
    )
