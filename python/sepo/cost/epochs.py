"""Hours of one epoch by each trainer: modelled for GPUs, and by a step that was measured."""

import textwrap
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

from sepo.cost.gpu import GPUS, UTILISATION
from sepo.cost.keys import Keys
from sepo.cost.planner import Plan
from sepo.cost.work import Schedule, scaled, step_work

POLICY, ORACLE, AT_ONCE = (
    "LLaMA3-8B",
    "TinyLlama-1.1B",
    8,
)  # pairs of TRL's micro-batch, its default
RECIPE = dict(
    method="sepo", model_name_or_path=POLICY, fraction=0.3, pairs_per_step=128,
    max_tokens_per_batch=8192, gradient_checkpointing=True,
)  # fmt: skip
PADDED = Schedule(packed=False, prompt_once=False, checkpointing=True)
TRL: dict[str, dict[str, Any]] = {  # on a GPU DPO's head takes the labelled positions alone, twice
    "TRL DPO": dict(reference="live", head_again=True),
    "TRL SimPO": dict(selected=False),
}
ROWS = (*TRL, "DPO", "SimPO", "SePO", "SePO and its oracle", "... scored by split products")


class Measured(NamedTuple):
    """Hold what a run's step took, a pair."""

    what: str  # the machine, the model, the pairs
    seconds: dict[str, float]  # of a whole step, by the contender's name
    reference: float  # of its pass, seconds

    def hours(self) -> dict[str, float]:
        """Of an epoch. The oracle is as large as the policy; its SFT was not measured."""
        dpo, simpo, sepo = (
            self.seconds.get(x, float("nan"))
            for x in ("dpo, cached reference", "simpo", "sepo 30 %")
        )
        oracle = self.reference + dpo + self.reference  # its training, its own pass
        seconds = {name: self.seconds.get(name, float("nan")) for name in TRL}
        seconds |= {"DPO": dpo + self.reference, "SimPO": simpo, "SePO": sepo}
        seconds["SePO and its oracle"] = sepo + oracle
        return {name: each * Keys.pairs / 3600 for name, each in seconds.items()}


@cache
def modelled(gpu: str) -> dict[str, float]:
    """GPU-hours of an epoch, as `sepo plan` has them."""
    plan = lambda **keys: Plan(
        "", RECIPE, Keys(gpu=gpu, oracle_model=ORACLE, truncated_tokens=260, **keys)
    )
    asked = plan()
    spent = lambda stages: sum(stage.hours for stage in stages)
    rows = {name: _trl(asked, **how) for name, how in TRL.items()}
    rows |= {"DPO": asked.train("dpo", cached=False).hours, "SimPO": asked.train("simpo").hours}
    rows["SePO"] = asked.train("sepo").hours
    both = plan(), plan(scoring_arithmetic="split")
    return rows | dict(zip(ROWS[-2:], (spent(x.stages()) for x in both), strict=True))


def _trl(asked: Plan, **how) -> float:
    setting, data = asked.setting, asked.data
    work = step_work(
        asked.policy, data.whole, float(data.whole[:, 1:].sum()), replace(PADDED, **how),
        pairs_at_once=AT_ONCE, steps=len(data.whole) / setting.pairs_per_step,
        gathered_over=setting.gpus if setting.shards(asked.policy, False) else 1,
        memory=setting.gpu.memory,
    )  # fmt: skip
    return setting.stage("", "", scaled(work, data.scale)).hours


def table(measured: Measured | None) -> str:
    """A line a trainer; the first column is measured, all others are modelled."""
    here = {} if measured is None else measured.hours()
    told = lambda hours: "-" if hours is None or hours != hours else f"{hours:.2f}"
    lines = [
        f"Hours of one epoch of {Keys.pairs} pairs",
        f"{'':30}{'measured':>12}" + f"{'modelled, GPU-hours':>{12 * len(GPUS)}}",
        f"{'':30}{'here':>12}" + "".join(f"{name:>12}" for name in GPUS),
    ]
    for name in ROWS:
        cells = [here.get(name), *(modelled(gpu)[name] for gpu in GPUS)]
        lines.append(f"{name:30}" + "".join(f"{told(hours):>12}" for hours in cells))
    where = "no step was measured" if measured is None else measured.what
    about = (
        f"Measured here: {where}. Hours of this machine; the oracle is of the policy's size, without "
        f"its SFT. Modelled, not measured: {POLICY} on {Keys.gpus} GPUs, oracle {ORACLE} with its SFT, "
        f"products at {UTILISATION:.0%} of the rate; TRL pads {AT_ONCE} pairs at a time; DPO's "
        f"reference is live, here it is cached and its pass counted. Split products: `sepo score --arithmetic split`."
    )
    return "\n".join([*lines, *textwrap.wrap(about, 110)])
