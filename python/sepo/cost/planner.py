"""Hours of each stage before they are spent, from a recipe and a few more keys."""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import yaml

from sepo.cost import lengths
from sepo.cost.decoder import Decoder, named
from sepo.cost.gpu import BANDWIDTH_SHARE, GPU, UTILISATION, find, hours, hours_at_full_rate
from sepo.cost.lengths import Lengths
from sepo.cost.work import Schedule, Work, forward_work, scaled, step_work
from sepo.errors import InputError
from sepo.flags.renamed import NAMES, today
from sepo.model.budget import OFF_A_GPU
from sepo.trainer.config import MethodName, SePOConfig
from sepo.trainer.methods import METHODS

STATE = 16  # bytes a trained parameter: float32 weight, gradient and two moments
ROOM = 0.7  # of a GPU's memory for them; the rest is for activations
CUT_SHARE = 260 / 372  # of a response that is read at 30 %: SePO's, with prompts of 124 tokens
BELOW_MEAN = 0.5  # of the tokens that ConfPO keeps: 0.51 and 0.68 of two data sets, by SmolLM2-135M


@dataclass(frozen=True)
class Keys:
    """Hold what a plan has to know beside a recipe. Lengths are means, in tokens."""

    gpu: str = "A100"
    gpus: int = 4
    utilisation: float = UTILISATION
    pairs: int = 61_135  # UltraFeedback's
    prompt_tokens: float = 124
    response_tokens: float = 372
    truncated_tokens: float | None = None  # of a response, up to its last selected token
    length_spread: float = lengths.SPREAD
    oracle_model: str | None = None  # default: the policy's shape
    oracle_pairs: int | None = None  # default: all
    sft_epochs: float = 2
    cached_reference: bool = True  # of the methods that have one
    tokens_per_second: float | None = None  # of one GPU, through the trunk, of a measured step


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

    def stage(self, name: str, what: str, work: Work, float32: bool = False) -> Stage:
        spent = hours(work, self.gpu, utilisation=self.utilisation, float32=float32)
        return Stage(name, what, spent, hours_at_full_rate(work, self.gpu, float32=float32))

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

    def score(self, decoder: Decoder, data: Lengths, passes: int) -> Work:
        rows = float(data.whole[:, 1:].sum())
        work = forward_work(decoder, data.whole, rows, tokens_at_once=self.tokens_at_once)
        return scaled(work, data.scale * passes)


def _reference(method: str, cached: bool) -> Literal["none", "live", "cached"]:
    if METHODS[method].reference is None:
        return "none"
    # a mask reads the layers of a live one
    return "cached" if cached and METHODS[method].reference != "layers" else "live"


def read(path: str | Path) -> tuple[dict, Keys]:
    """A recipe's keys and the plan's own. Raises InputError, a line for each key that is neither."""
    try:
        found = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path}: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected keys and values, got {type(found).__name__}")
    own = {field.name: field for field in fields(Keys)}
    known = own.keys() | SePOConfig.__dataclass_fields__.keys() | NAMES.keys()
    if unknown := [key for key in found if key not in known]:
        raise InputError("\n".join(f"{path}: no recipe and no plan has a key {k}" for k in unknown))
    for key, value in found.items():
        if key in own and not _fits(own[key], value):
            raise InputError(f"{path}: {key}: expected {_expected(own[key])}, got {value}")
    return today(found)[0], Keys(**{key: found[key] for key in own if key in found})


def _fits(field, value) -> bool:
    if value is None:
        return field.default is None
    if field.type in (str, str | None):
        return isinstance(value, str)
    if field.type is bool:
        return isinstance(value, bool)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    whole = field.type in (int, int | None)
    most = 1 if field.name == "utilisation" else np.inf
    return 0 < value <= most and not (whole and value != int(value))


def _expected(field) -> str:
    if field.type in (str, str | None):
        return "a name"
    if field.type is bool:
        return "true or false"
    return "a number in (0, 1]" if field.name == "utilisation" else "a positive number"


def plan(path: str | Path) -> str:
    """A table of the stages and the break-even, as text. Raises InputError."""
    recipe, keys = read(path)
    default = lambda name: recipe.get(name, SePOConfig.__dataclass_fields__[name].default)
    method, model = default("method"), default("model_name_or_path")
    if method not in METHODS:
        raise InputError(
            f"{path}: method: expected {' | '.join(get_args(MethodName))}, got {method}"
        )
    if model is None:
        raise InputError(
            f"{path}: expected model_name_or_path, the policy's directory or its shape"
        )
    uses_mass = "mass" in (default("select"), default("rejected_select"))
    share = lambda name: _share(path, name, "mass" if uses_mass else default(name))
    fraction = share("fraction")
    if default("rejected_fraction") is not None:
        fraction = (fraction + share("rejected_fraction")) / 2
    setting = Setting(
        find(keys.gpu), keys.gpus, keys.utilisation,
        default("max_tokens_per_batch") or OFF_A_GPU, default("pairs_per_step"),
        bool(default("gradient_checkpointing")), bool(default("selective_checkpointing")),
        keys.length_spread,
    )  # fmt: skip
    policy = named(model)
    oracle = named(keys.oracle_model) if keys.oracle_model else policy
    data = _lengths(keys, keys.pairs)
    rank = default("lora_r") if default("use_peft") else 0
    epochs = float(default("num_train_epochs"))
    cached = keys.cached_reference and not rank

    kept = _kept(path, method, default)

    def train(of: str, cached: bool = cached, **more: Any) -> Stage:
        work = setting.train(
            of, policy, data, epochs=epochs, rank=rank, cached=cached, fraction=fraction, **more
        )
        return setting.stage("train", f"{of}, {model}", work)

    stages = []
    if METHODS[method].needs_score:
        stages += oracle_stages(setting, oracle, keys.oracle_model or model, keys, data)
    elif _reference(method, cached) == "cached":
        work = setting.score(policy, data, 1)
        stages.append(setting.stage("reference", f"of {model}, kept, float32", work, float32=True))
    stages.append(train(method, kept=kept))
    text = [*_heading(keys, setting, policy, rank, kept), "", *table(stages, keys.gpus)]
    if keys.tokens_per_second is not None:
        tokens = setting.read(method, data, fraction)[0].sum() * data.scale * epochs
        spent = tokens / keys.tokens_per_second / 3600
        text += ["", *textwrap.wrap(_measured(keys, tokens, spent, stages[-1].hours), 100)]
    if METHODS[method].needs_score:
        lines = break_even(stages, train("dpo", cached=False), train("simpo"))
        text += ["", *(part for line in lines for part in textwrap.wrap(line, 100))]
    return "\n".join(text)


def oracle_stages(
    setting: Setting, oracle: Decoder, name: str, keys: Keys, data: Lengths
) -> list[Stage]:
    """Reference, oracle and scores, with the whole model trained and without a cache to begin with."""
    few = _lengths(keys, keys.oracle_pairs or keys.pairs)
    sft = setting.train("sft", oracle, few, epochs=keys.sft_epochs)
    kept = setting.score(oracle, few, 1)
    dpo = setting.train("dpo", oracle, few, epochs=1)
    # a store with the reference's log-probabilities of all pairs spares its second pass
    both = few.pairs < data.pairs
    scores = setting.score(oracle, data, 1 + both)
    return [
        setting.stage("SFT", f"reference, {name}, {keys.sft_epochs:g} epochs", sft),
        setting.stage("reference", "its log-probabilities, float32", kept, float32=True),
        setting.stage("oracle", f"dpo, {name}", dpo),
        setting.stage("score", f"oracle{' and reference' * both}, float32", scores, float32=True),
    ]


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


def _heading(
    keys: Keys, setting: Setting, policy: Decoder, rank: int, kept: float | None
) -> list[str]:
    sharded = "sharded" if setting.shards(policy, rank > 0) else "whole on each"
    guessed = " (assumed)" if keys.truncated_tokens is None else ""
    about = (
        f"{keys.gpus} x {keys.gpu}, the policy {sharded}. {keys.pairs} pairs; mean tokens: prompt "
        f"{keys.prompt_tokens:g}, response {keys.response_tokens:g}, up to the last selected one "
        f"{_cut(keys):.0f}{guessed}. Products at {keys.utilisation:.0%} of the GPU's rate, memory at "
        f"{BANDWIDTH_SHARE:.0%} of its bandwidth. At 100 %: what the model needs, no more, at the rate."
    )
    if kept is not None:
        about += (
            f" The head without a gradient at every response token, then with one at {kept:.0%} of "
            "them."
        )
    return ["Modelled, not measured", *textwrap.wrap(about, 100)]


def _measured(keys: Keys, tokens: float, spent: float, modelled: float) -> str:
    return (
        f"Measured, not modelled: {tokens / 1e6:.1f} million tokens through the trunk, at "
        f"{keys.tokens_per_second:g} a second and GPU, make {spent:.2f} GPU-hours of training; the "
        f"model says {modelled:.2f}."
    )


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
    return BELOW_MEAN if method == "confpo" else 1 - _quantile(path, flag("selection_quantile"))


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
