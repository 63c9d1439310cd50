"""The cases of whole steps: the model, the pairs and the contenders of each."""

import logging
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import ClassVar

import torch
import transformers

from bench import report
from bench.contender import Contender, installed, missing
from bench.harness import Row
from bench.steps import dense, models, ours, savings, table, trl
from bench.steps.inputs import Steps
from bench.steps.models import Weights
from bench.steps.pairs import deal, default_source, taken, texts, with_scores
from sepo.trainer.step import MASK

ATTENTION = {"cpu": (None,), "cuda": ("varlen", "flex", "sdpa")}
SHORT = ("TRL DPO", "TRL SimPO", *ours.NAMES.values())  # of step-short
METHODS = ("tdpo2", "sparsepo")  # that read the reference's whole distribution
SAVING_ROUNDS = 3


@dataclass(frozen=True)
class StepCase:
    """The same for all contenders."""

    suite: ClassVar[str] = "step"
    kept: ClassVar[bool] = True  # a model is not loaded twice
    legend: ClassVar[str] = table.LEGEND
    long: ClassVar[bool] = False
    shape: ClassVar[dict] = {}
    name: str
    model: str | None = None  # models.load says what; None: SmolLM2, or its shape
    data: Path | None = None
    pairs: int = 4  # of one step
    rounds: int = 7
    max_length: int = 512
    float32: bool = False  # no autocast
    wanted: tuple[str, ...] = field(default=(), compare=False)  # names and groups; (): all
    method: str = ""  # of METHODS, beside full softmaxes of both models; else beside TRL

    dtype = property(lambda self: torch.float32 if self.float32 else torch.bfloat16)  # timed

    def inputs(self, device: str) -> Steps:
        be_quiet()
        name = self.model or models.smollm2_here()
        model, tokenizer = models.load(name, device)
        weights = Weights(model)
        data = "drawn tokens" if tokenizer is None else (self.data or default_source()).name
        about = dict(
            model=name, data=data, max_length=self.max_length, pairs=self.pairs,
            setting=self.conditions(device),
        )  # fmt: skip
        count, vocabulary = self.pairs * self.rounds, model.config.vocab_size
        pairs, told = taken(self.data, tokenizer, vocabulary, self.max_length, count)
        if self.method:
            (rounds, found), truth = self._beside_softmaxes(weights, pairs), dense.truth
        else:
            rounds, found, more = self._beside_trl(weights, pairs, tokenizer, about)
            told, truth = told + more, savings.truth
        found = [c for c in found if self.asks_for(c.group, c.name)]
        what = f"{self.pairs} pairs a step of at most {self.max_length} tokens"
        heading = f"\n{self.name}: {name}, {told}\n{what}; {about['setting'][0]}"
        return Steps(found, weights, rounds, truth, self.dtype, about, heading)

    def text(self, rows: list[Row], roof: str, heading: str) -> str:
        lines = [heading, roof, "", table.table(rows, self.method or table.SEPO)]
        which = table.kl_bars(self.method) if self.method else ()
        if self.method or self.name == "step":  # a glance, step-short, has none
            lines += ["", table.bars(rows, *which)]
        return "\n".join(lines).rstrip()

    def conditions(self, device: str) -> tuple[str, ...]:
        libraries = f"torch {torch.__version__}", f"transformers {transformers.__version__}"
        cast = "no" if self.float32 else "bfloat16"
        return (
            f"weights float32, {cast} autocast, fused AdamW in float32",
            f"{report.machine(device)}, {torch.get_num_threads()} threads",
            ", ".join((*libraries, missing("trl") or installed("trl")())),
        )

    def asks_for(self, group: str, *names: str) -> bool:
        asked = self.wanted
        return not asked or any(fnmatch(x, w) for w in asked for x in (group, *names))

    def _beside_trl(
        self, weights: Weights, pairs: list, tokenizer, about: dict
    ) -> tuple[list[list], list[Contender], str]:  # rounds, contenders, what TRL dropped
        beside_trl, told = self.asks_for("trl", *(v.name for v in trl.VARIANTS)), ""
        if tokenizer is not None and beside_trl:
            data = texts(self.data or default_source())
            kept = trl.kept(data, weights, tokenizer, self.max_length)
            told = f"\n{sum(pair.id not in kept for pair in pairs):8} of these dropped by TRL"
            pairs = [pair for pair in pairs if pair.id in kept]
        rounds = deal([with_scores(pair) for pair in pairs], self.rounds, self.pairs)
        # the reference's log-probabilities are computed once a pair, and that has its price
        flat = {pair.id: pair for found in rounds for pair in found}
        done, about["reference_seconds"] = ours.reference_logp(weights, list(flat.values()))
        flat = {pair.id: pair for pair in done}
        rounds = [[flat[pair.id] for pair in found] for found in rounds]
        found, bf16 = [], not self.float32
        if beside_trl:
            length = self.max_length
            found += trl.contenders(weights, rounds, tokenizer, bf16=bf16, max_length=length)
        if self.asks_for("sepo", *ours.NAMES.values()):
            impls = ATTENTION[weights.model.device.type]
            found += ours.contenders(weights, rounds, bf16=bf16, attn_impls=impls)
        if self.asks_for("savings", *savings.names()):
            found += savings.contenders(weights, rounds, bf16=bf16, turns=SAVING_ROUNDS)
        return rounds, found, told

    def _beside_softmaxes(
        self, weights: Weights, pairs: list
    ) -> tuple[list[list], list[Contender]]:  # rounds: each contender has its way to the reference
        rounds = deal(pairs, self.rounds, self.pairs)
        if self.method == "sparsepo":
            weights.add(MASK, ours.new_mask(weights))
        options = dict(bf16=not self.float32)
        return rounds, [
            *dense.contenders(self.method, weights, rounds, **options),
            *ours.kl_contenders(self.method, weights, rounds, **options),
        ]


def be_quiet() -> None:
    if not missing("datasets"):
        import datasets

        datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)


def cases(
    wanted: tuple[str, ...] = (), dtype: str = "bfloat16", *,
    model: str | None = None, data: Path | None = None,
    **numbers: int | None,  # rounds, pairs and max_length, where they were asked for
) -> list[StepCase]:  # fmt: skip
    """All of them."""
    float32 = dtype == "float32"
    numbers = {name: number for name, number in numbers.items() if number is not None}
    of = lambda name, wanted=wanted, method="", **usual: StepCase(
        name, model, data, **usual | numbers, float32=float32, wanted=wanted, method=method
    )
    # in float32 two cores have no time for more than a pair a step
    few = dict(pairs=1 if float32 else 2, rounds=3, max_length=192)
    return [
        of("step-short", wanted or SHORT, **few),
        of("step"),
        *(of(f"step-{method}", method=method, rounds=3) for method in METHODS),
    ]
