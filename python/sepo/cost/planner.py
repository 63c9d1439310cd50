"""Hours of each stage before they are spent, from a recipe and a few more keys."""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from sepo.cost import lengths
from sepo.cost.decoder import Decoder, named
from sepo.cost.gpu import (
    BANDWIDTH_SHARE,
    BFLOAT16,
    FLOAT32,
    GPU,
    SPLIT,
    SPLIT_EXACT,
    Arithmetic,
    find,
    hours,
    hours_at_full_rate,
)
from sepo.cost.keys import Keys, read
from sepo.cost.lengths import Lengths
from sepo.cost.work import Schedule, Work, forward_work, scaled, step_work
from sepo.errors import InputError
from sepo.model.budget import OFF_A_GPU
from sepo.trainer.config import MethodName, SePOConfig
from sepo.trainer.methods import METHODS

STATE = 16  # bytes a trained parameter: float32 weight, gradient and two moments
ROOM = 0.7  # of a GPU's memory for them; the rest is for activations
CUT_SHARE = 260 / 372  # of a response that is read at 30 %: SePO's, with prompts of 124 tokens
BELOW_MEAN = 0.5  # of the tokens that ConfPO keeps: 0.51 and 0.68 of two data sets, by SmolLM2-135M


@dataclass(frozen=True)
class Stage:
    name: str
    what: str
    hours: float  # GPU-hours
    full_rate: float  # GPU-hours for what the model needs, at the rate of the data sheet


@dataclass(frozen=True)
class Setting:
    """Everything that is the same for all stages."""

    gpu: GPU
    gpus: int
    utilisation: float
    tokens_at_once: int | None
    pairs_per_step: int
    checkpointing: bool
    cheap: bool
    spread: float
    scoring: Arithmetic

    def stage(self, name: str, what: str, work: Work, arithmetic: Arithmetic = BFLOAT16) -> Stage:
        spent = hours(work, self.gpu, utilisation=self.utilisation, arithmetic=arithmetic)
        return Stage(name, what, spent, hours_at_full_rate(work, self.gpu, arithmetic=arithmetic))

    def scored(self, name: str, what: str, work: Work) -> Stage:
        """A stage of log-probabilities that scores are made of."""
        return self.stage(name, f"{what}, {self.scoring.name}", work, self.scoring)

    def shards(self, decoder: Decoder, frozen: bool) -> bool:
        bytes = (2 if frozen else STATE) * decoder.parameters
        return self.gpus > 1 and bytes > ROOM * self.gpu.memory

    def train(
        self, method: str, decoder: Decoder, data: Lengths, *,
        epochs: float, rank: int = 0, cached: bool = True, fraction: float = 1.0,
        kept: float | None = None,
    ) -> Work:  # fmt: skip
        """An epoch, or several, of this project's step."""
        about = METHODS[method]
        sizes, rows = self.read(method, data, fraction)
        schedule = Schedule(
            reference=_reference(method, cached and not rank),
            kl=about.direction is not None,
            kept=kept,
            checkpointing=self.checkpointing,
            recompute_cheap=self.cheap,
            frozen=rank > 0,
            adapter_rank=rank,
            responses=1 if about.positions == "chosen" else 2,
        )
        work = step_work(
            decoder, sizes, rows, schedule,
            tokens_at_once=self.tokens_at_once, steps=len(sizes) / self.pairs_per_step,
            gathered_over=self.gpus if self.shards(decoder, rank > 0) else 1,
            memory=self.gpu.memory,
        )  # fmt: skip
        return scaled(work, data.scale * epochs)

    def read(self, method: str, data: Lengths, fraction: float) -> tuple[np.ndarray, float]:
        """Give what the trunk reads, (pairs, 3): prompt, chosen, rejected; and the head's rows."""
        positions = METHODS[method].positions
        if positions == "selected":
            return data.cut, data.selected(fraction)
        if positions == "random":
            return lengths.drawn_at_random(data, fraction), data.selected(fraction)
        if positions == "chosen":
            return data.whole * (1, 1, 0), float(data.whole[:, 1].sum())
        return data.whole, float(data.whole[:, 1:].sum())

    def score(self, decoder: Decoder, data: Lengths) -> Work:
        rows = float(data.whole[:, 1:].sum())
        work = forward_work(decoder, data.whole, rows, tokens_at_once=self.tokens_at_once)
        return scaled(work, data.scale)


def _reference(method: str, cached: bool) -> Literal["none", "live", "cached"]:
    if METHODS[method].reference is None:
        return "none"
    # a mask reads the layers of a live one
    return "cached" if cached and METHODS[method].reference != "layers" else "live"


def plan(path: str | Path) -> str:
    """A table of the stages and the break-even, as text. Raises InputError."""
    asked = Plan(path, *read(path))
    found, keys = asked.stages(), asked.keys
    text = [*_heading(asked), "", *table(found, keys.gpus)]
    if keys.tokens_per_second is not None:
        text += ["", *_wrapped(_measured(asked, keys.tokens_per_second, found[-1].hours))]
    if METHODS[asked.method].needs_score:
        lines = break_even(found, asked.train("dpo", cached=False), asked.train("simpo"))
        text += ["", *(part for line in lines for part in _wrapped(line))]
    return "\n".join([*text, "", *_wrapped(cheaper(asked, found))])


class Plan:
    """A recipe with everything that its stages are computed from."""

    def __init__(self, path: str | Path, recipe: dict, keys: Keys):
        """Raises InputError for a value that has no plan."""
        self.path, self.recipe, self.keys = path, recipe, keys
        default = lambda name: recipe.get(name, SePOConfig.__dataclass_fields__[name].default)
        self.method, self.model = default("method"), default("model_name_or_path")
        if self.method not in METHODS:
            known = " | ".join(get_args(MethodName))
            raise InputError(f"{path}: method: expected {known}, got {self.method}")
        if self.model is None:
            raise InputError(
                f"{path}: expected model_name_or_path, the policy's directory or its shape"
            )
        uses_mass = "mass" in (default("select"), default("rejected_select"))
        share = lambda name: _share(path, name, "mass" if uses_mass else default(name))
        self.fraction = share("fraction")
        if default("rejected_fraction") is not None:
            self.fraction = (self.fraction + share("rejected_fraction")) / 2
        self.setting = Setting(
            find(keys.gpu), keys.gpus, keys.utilisation,
            default("max_tokens_per_batch") or OFF_A_GPU, default("pairs_per_step"),
            bool(default("gradient_checkpointing")), bool(default("selective_checkpointing")),
            keys.length_spread, _scoring(path, keys),
        )  # fmt: skip
        self.policy = named(self.model)
        self.data = _lengths(keys, keys.pairs)
        self.rank = default("lora_r") if default("use_peft") else 0
        self.epochs = float(default("num_train_epochs"))
        self.kept = _kept(path, self.method, default)

    def train(self, method: str, *, cached: bool = True, kept: float | None = None) -> Stage:
        """The policy's training, by its own method or by another."""
        work = self.setting.train(
            method, self.policy, self.data, epochs=self.epochs, rank=self.rank,
            fraction=self.fraction, cached=cached and self.keys.cached_reference, kept=kept,
        )  # fmt: skip
        return self.setting.stage("train", f"{method}, {self.model}", work)

    def stages(self) -> list[Stage]:
        """All that is spent, in order; the policy's training comes last."""
        before, cached = [], self.keys.cached_reference and not self.rank
        if METHODS[self.method].needs_score:
            before = self._oracle()
        elif _reference(self.method, cached) == "cached":
            work = self.setting.score(self.policy, self.data)
            before = [self.setting.scored("reference", f"of {self.model}, kept", work)]
        return [*before, self.train(self.method, kept=self.kept)]

    def _oracle(self) -> list[Stage]:
        """Reference, oracle and scores, with the whole model trained and without a cache at first.

        The reference reads every pair once: scores need that, and it is what the oracle's DPO needs
        of the pairs that it trains on.
        """
        setting, keys = self.setting, self.keys
        name = keys.oracle_model or self.model
        oracle = named(keys.oracle_model) if keys.oracle_model else self.policy
        few = _lengths(keys, keys.oracle_pairs or keys.pairs)
        sft = setting.train("sft", oracle, few, epochs=keys.sft_epochs)
        dpo = setting.train("dpo", oracle, few, epochs=1)
        a_pass = setting.score(oracle, self.data)
        return [
            setting.stage("SFT", f"reference, {name}, {keys.sft_epochs:g} epochs", sft),
            setting.scored("reference", "its log-probabilities", a_pass),
            setting.stage("oracle", f"dpo, {name}", dpo),
            setting.scored("score", "oracle", a_pass),
        ]


def cheaper(asked: Plan, stages: list[Stage]) -> str:
    """Say which changes would take a hundredth less or better, each by itself, the best first."""
    keys, spent = asked.keys, sum(stage.hours for stage in stages)
    fewer = max(1, (keys.oracle_pairs or keys.pairs) // 4)
    changes: list[tuple[str, dict, dict]] = [  # of the recipe, of the keys
        (
            "scoring_arithmetic: split (sepo score --arithmetic split)",
            {},
            dict(scoring_arithmetic="split"),
        ),
        ("bfloat16_checkpoints: true, if they are", {}, dict(bfloat16_checkpoints=True)),
        ("cached_reference: true", {}, dict(cached_reference=True)),
        (f"oracle_pairs: {fewer} (another oracle)", {}, dict(oracle_pairs=fewer)),
        ("sft_epochs: 1 (another reference)", {}, dict(sft_epochs=1)),
    ]
    if asked.setting.checkpointing:
        less = dict(gradient_checkpointing=False, selective_checkpointing=True)
        changes.append(("selective_checkpointing for gradient_checkpointing, if it fits", less, {}))
    saved = {}
    for name, recipe, own in changes:
        other = Plan(asked.path, asked.recipe | recipe, replace(keys, **own))
        saved[name] = spent - sum(stage.hours for stage in other.stages())
    best = sorted((n for n in saved if saved[n] > spent / 100), key=lambda n: -saved[n])
    told = "; ".join(f"{name}, {saved[name]:.2f}" for name in best) or "nothing that a plan can say"
    return f"What would make this cheaper, GPU-hours that each alone would save: {told}."


def break_even(stages: list[Stage], dpo: Stage, simpo: Stage) -> list[str]:
    """How many trainings pay for the oracle."""
    train, before = stages[-1].hours, sum(stage.hours for stage in stages[:-1])
    lines = [
        f"Before the first step of the policy: {before:.2f} GPU-hours. They serve every policy."
    ]
    for name, other in (("DPO with a live reference", dpo), ("SimPO", simpo)):
        saved = other.hours - train
        if saved <= 0:
            lines.append(
                f"{name} would take {other.hours:.2f}: nothing is saved, nothing pays back."
            )
            continue
        lines.append(
            f"{name}, packed too, would take {other.hours:.2f}: each run saves {saved:.2f}, "
            f"and the oracle has paid after {before / saved:.1f} runs."
        )
    return lines


def table(stages: list[Stage], gpus: int) -> list[str]:
    row = lambda name, what, a, b: f"{name:11}{what:44}{a:11.2f}{a / gpus:9.2f}{b:11.2f}"
    lines = [f"{'stage':11}{'':44}{'GPU-hours':>11}{'hours':>9}{'at 100 %':>11}"]
    lines += [row(stage.name, stage.what, stage.hours, stage.full_rate) for stage in stages]
    columns = ([s.hours for s in stages], [s.full_rate for s in stages])
    return [*lines, row("all", "", *map(sum, columns))]


def _heading(asked: Plan) -> list[str]:
    keys, setting = asked.keys, asked.setting
    sharded = "sharded" if setting.shards(asked.policy, asked.rank > 0) else "whole on each"
    guessed = " (assumed)" if keys.truncated_tokens is None else ""
    about = (
        f"{keys.gpus} x {keys.gpu}, the policy {sharded}. {keys.pairs} pairs; mean tokens: prompt "
        f"{keys.prompt_tokens:g}, response {keys.response_tokens:g}, up to the last selected one "
        f"{_cut(keys):.0f}{guessed}. Products at {keys.utilisation:.0%} of the GPU's rate, memory at "
        f"{BANDWIDTH_SHARE:.0%} of its bandwidth: {_rates(setting)}. At 100 %: what the model needs, no "
        "more, at the rate."
    )
    if asked.kept is not None:
        about += (
            f" The head without a gradient at every response token, then with one at {asked.kept:.0%} "
            "of them."
        )
    return ["Modelled, not measured", *_wrapped(about)]


def _rates(setting: Setting) -> str:
    """Say what the products' rates are."""
    gpu, scoring = setting.gpu, setting.scoring
    told = f"{gpu.flop / 1e12:g} TFLOP/s in bfloat16, {gpu.bandwidth / 1e12:g} TB/s"
    if scoring.halves:
        return (
            f"{told}; scoring, {scoring.halves} products of 16-bit halves for one "
            f"({gpu.flop / scoring.halves / 1e12:.0f} TFLOP/s), attention in float32 "
            f"({gpu.float32 / 1e12:g})"
        )
    return f"{told}; scoring, {gpu.float32 / 1e12:g} TFLOP/s in float32"


def _measured(asked: Plan, rate: float, modelled: float) -> str:
    """Say what training takes at a measured rate, tokens a second of one GPU."""
    sizes, _ = asked.setting.read(asked.method, asked.data, asked.fraction)
    tokens = sizes.sum() * asked.data.scale * asked.epochs
    return (
        f"Measured, not modelled: {tokens / 1e6:.1f} million tokens through the trunk, at {rate:g} a "
        f"second and GPU, make {tokens / rate / 3600:.2f} GPU-hours of training; the model says "
        f"{modelled:.2f}."
    )


def _scoring(path, keys: Keys) -> Arithmetic:
    known = {"float32": FLOAT32, "split": SPLIT_EXACT if keys.bfloat16_checkpoints else SPLIT}
    if keys.scoring_arithmetic not in known:
        expected = " | ".join(known)
        raise InputError(
            f"{path}: scoring_arithmetic: expected {expected}, got {keys.scoring_arithmetic}"
        )
    return known[keys.scoring_arithmetic]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 100)


def _cut(keys: Keys) -> float:
    given = keys.truncated_tokens
    return CUT_SHARE * keys.response_tokens if given is None else given


def _lengths(keys: Keys, pairs: int) -> Lengths:
    means = keys.prompt_tokens, keys.response_tokens, _cut(keys)
    return lengths.from_means(*means, pairs=pairs, spread=keys.length_spread)


def _kept(path, method: str, flag: Callable[[str], Any]) -> float | None:
    """Give the share of the tokens that a method's rule keeps; None for a method without one."""
    if METHODS[method].rule is None:
        return None
    if method == "confpo":
        return BELOW_MEAN
    if method == "selective-dpo":
        return 1 - _quantile(path, flag("selection_quantile"))
    return _share(path, "fraction", flag("fraction"))


def _quantile(path, value) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise InputError(f"{path}: selection_quantile: expected a number in [0, 1], got {value}")
    return float(value)


def _share(path, name: str, value) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise InputError(
            f"{path}: {name}: expected a number, how many tokens {value} takes is not known "
            "before they are scored"
        ) from None
    if not 0 < found <= 1:
        raise InputError(f"{path}: {name}: expected a number in (0, 1], got {value}")
    return found
