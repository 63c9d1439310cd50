"""A race as the run takes it: the model, the pairs and the contenders of one case."""

import gc
import logging
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

import torch
import transformers

from bench import report
from bench.end_to_end import models, ours, savings, table, trl
from bench.end_to_end.contender import Contender
from bench.end_to_end.race import Race, Row
from bench.end_to_end.rows import deal, default_source, texts, with_scores
from bench.end_to_end.weights import Weights
from bench.provider import missing

ATTENTION = {"cpu": (None,), "cuda": ("varlen", "flex", "sdpa")}
SHORT = ("TRL DPO", "TRL SimPO", *ours.NAMES.values())  # of step-short


@dataclass(frozen=True)
class Setting:
    """The same for all contenders of a case."""

    device: str
    model: str | None = None  # models.load says what; None: SmolLM2, or its shape
    data: Path | None = None
    pairs: int = 4  # of one step
    rounds: int = 7
    max_length: int = 512
    float32: bool = False  # no autocast


class StepJob:
    """A race that is opened when its gate is asked for: `gate`, `ready`, `turn`, `finish`."""

    suite = "step"
    base = table.SEPO  # the contender that the others are told in multiples of
    SAVING_ROUNDS = 3

    def __init__(self, name: str, setting: Setting, wanted: tuple[str, ...] = ()):
        self.name, self.setting, self.wanted = name, setting, wanted
        self.rounds, self.rows, self.about = setting.rounds, [], {}
        self.legend = table.LEGEND

    def gate(self) -> list[Row]:
        be_quiet()
        name = self.setting.model or models.smollm2_here()
        model, tokenizer = models.load(name, self.setting.device)
        weights = Weights(model)
        data = "drawn tokens" if tokenizer is None else (self.setting.data or default_source()).name
        self.about = dict(
            model=name, data=data, max_length=self.setting.max_length, pairs=self.setting.pairs,
            setting=self._conditions(),
        )  # fmt: skip
        pairs, self._told = self._pairs(weights, tokenizer)
        rounds = self._with_reference(weights, deal(pairs, self.rounds, self.setting.pairs))
        found = [c for c in self._contenders(weights, rounds, tokenizer) if self._takes(c)]
        dtype = torch.float32 if self.setting.float32 else torch.bfloat16
        self._race = Race(found, weights, rounds, case=self.name, dtype=dtype, **self._truth())
        return self._race.gate()

    def ready(self) -> None:
        self._race.ready()

    def turn(self) -> None:
        self._race.turn()

    def finish(self) -> list[Row]:
        self.rows, self._roof = self._race.finish(), self._race.roof
        self.about |= self._race.about
        del self._race
        gc.collect()  # modules are cycles; the next case's memory is not to be theirs
        return self.rows

    def text(self) -> str:
        title = f"\n{self.name}: {self.about['model']}, {self._told}"
        what = f"{self.setting.pairs} pairs a step of at most {self.setting.max_length} tokens"
        lines = [title, f"{what}; {self.about['setting'][0]}", self._roof]
        lines += ["", table.table(self.rows, self.base)]
        return "\n".join([*lines, "", self._bars()]).rstrip()

    def _bars(self) -> str:
        # the project's bars are of four pairs of up to 512 tokens, not of a glance
        return table.bars(self.rows) if self.name == "step" else ""

    def _truth(self) -> dict:
        return {}

    def _pairs(self, weights: Weights, tokenizer) -> tuple[list, str]:
        """The pairs that everybody takes, and what became of the rest."""
        own, V = self.setting, weights.model.config.vocab_size
        count = own.pairs * own.rounds
        pairs, told = models.pairs(own.data, tokenizer, V, own.max_length, count)
        if tokenizer is not None and self._asks_for("trl", *(v.name for v in trl.VARIANTS)):
            data = texts(own.data or default_source())
            kept = trl.kept(data, weights, tokenizer, own.max_length)
            told += f"\n{sum(pair.id not in kept for pair in pairs):8} of these dropped by TRL"
            pairs = [pair for pair in pairs if pair.id in kept]
        return [with_scores(pair) for pair in pairs], told

    def _with_reference(self, weights: Weights, rounds: list[list]) -> list[list]:
        """With the reference's log-probabilities, computed once a pair, and what that costs."""
        flat = {pair.id: pair for pairs in rounds for pair in pairs}
        done, seconds = ours.reference_logp(weights, list(flat.values()))
        self.about["reference_seconds"] = seconds  # a pair
        flat = {pair.id: pair for pair in done}
        return [[flat[pair.id] for pair in pairs] for pairs in rounds]

    def _contenders(self, weights: Weights, rounds: list, tokenizer) -> list[Contender]:
        own, found = self.setting, []
        bf16, length = not own.float32, own.max_length
        if self._asks_for("trl", *(v.name for v in trl.VARIANTS)):
            found += trl.contenders(weights, rounds, tokenizer, bf16=bf16, max_length=length)
        if self._asks_for("sepo", *ours.NAMES.values()):
            impls = ATTENTION[own.device]
            found += ours.contenders(weights, rounds, bf16=bf16, attn_impls=impls)
        if self._asks_for("savings", *savings.names()):
            found += savings.contenders(weights, rounds, bf16=bf16, turns=self.SAVING_ROUNDS)
        return found

    def _asks_for(self, group: str, *names: str) -> bool:
        asked = self.wanted
        return not asked or any(fnmatch(x, w) for w in asked for x in (group, *names))

    def _takes(self, contender: Contender) -> bool:
        return self._asks_for(contender.group, contender.name)

    def _conditions(self) -> tuple[str, ...]:
        libraries = f"torch {torch.__version__}", f"transformers {transformers.__version__}"
        cast = "no" if self.setting.float32 else "bfloat16"
        return (
            f"weights float32, {cast} autocast, fused AdamW in float32",
            f"{report.machine(self.setting.device)}, {torch.get_num_threads()} threads",
            ", ".join((*libraries, trl.version())),
        )


def be_quiet() -> None:
    if not missing("datasets"):
        import datasets

        datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)


def jobs(setting: Setting, wanted: tuple[str, ...], given: dict) -> list[StepJob]:
    """All cases of whole steps; `given` are the numbers that the user asked for."""
    from bench.kl_steps.job import KLJob  # it is made of this module

    of = lambda **numbers: replace(setting, **numbers | given)
    # in float32 two cores have no time for more than a pair a step
    short = of(pairs=1 if setting.float32 else 2, rounds=3, max_length=192)
    return [
        StepJob("step-short", short, wanted or SHORT),
        StepJob("step", of(), wanted),
        *(KLJob(method, of(rounds=3), wanted) for method in KLJob.METHODS),
    ]
