"""Report a run: means over all pairs of all ranks, and one JSON line a log."""

import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from sepo.system.files import Atomic
from sepo.trainer.methods import Method, ResponseSums, TokenValues


def pair_metrics(
    sums: ResponseSums,
    losses: Tensor,  # (P,)
    rewards: Tensor | None,  # (S,), None: the method compares nothing
    tokens: TokenValues,
) -> dict[str, Tensor]:
    """Sums over the pairs, under TRL's names; of a rule, the pairs that it leaves out."""
    logp_chosen, logp_rejected = sums.logp.view(-1, 2).unbind(1)
    totals = {"loss": losses.sum(), "logps/chosen": logp_chosen.sum()}
    if tokens.router_loss is not None:
        totals["aux_loss"] = tokens.router_loss.sum()
    if tokens.keep is not None:
        totals["selection/empty"] = sums.empty.sum()
    if rewards is None:
        return totals
    chosen, rejected = rewards.view(-1, 2).unbind(1)
    return {
        **totals,
        "logps/rejected": logp_rejected.sum(),
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/margins": (chosen - rejected).sum(),
        "rewards/accuracies": (chosen > rejected).sum(),
    }


def token_metrics(tokens: TokenValues) -> dict[str, Tensor]:
    """Sums over the used tokens: their KL, of a rule those kept, of a mask values, zeros, the rest."""
    sums = {} if tokens.kl is None else {"kl": tokens.kl.sum()}
    if tokens.keep is not None:
        sums["selection/density"] = tokens.keep.sum()
    for name in ("reward", "kl"):
        mask = getattr(tokens, f"{name}_mask")
        if mask is not None:
            zeros = (mask == 0).sum()
            sums[f"mask/{name}/mean"] = mask.sum()
            sums[f"mask/{name}/sparsity"] = zeros
            sums[f"mask/{name}/density"] = len(mask) - zeros
    return sums


def metric_names(method: Method) -> list[str]:
    """List what the two report together, for a method."""
    sides = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    names = ["loss", "logps/chosen"]
    names += ["logps/rejected", *sides] * (method.reward is not None)
    names += ["kl"] * (method.direction is not None)
    names += ["selection/empty", "selection/density"] * (method.rule is not None)
    masks = ("reward", "kl") if method.mask is not None else ()
    return names + [f"mask/{m}/{n}" for m in masks for n in ("mean", "sparsity", "density")]


class RunningMeans:
    """Sums kept on the device; one all-reduce and one transfer when they are read."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, sums: dict[str, Tensor], count: int) -> None:
        """Sums of `count` values each: of pairs, or of tokens."""
        for name, value in sums.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + count

    def pop(self, accelerator) -> dict[str, float]:
        """Means over what every rank added since the last call. Every rank must call it."""
        names = sorted(self._sums)  # not in the order of arrival, which ranks may differ in
        if not names:
            return {}
        values = torch.stack([self._sums[name].to(accelerator.device) for name in names])
        counts = values.new_tensor([self._counts[name] for name in names])
        sums, counts = accelerator.reduce(torch.stack([values, counts]), "sum").tolist()
        self._sums, self._counts = {}, {}
        return {n: s / max(c, 1) for n, s, c in zip(names, sums, counts, strict=True)}

    def state(self) -> dict:
        """This rank's part, for JSON: name -> [sum, count]."""
        return {name: [value.item(), self._counts[name]] for name, value in self._sums.items()}

    def restore(self, states: list[dict]) -> None:
        """Add what `state` returned, of as many ranks as there were."""
        for state in states:
            for name, (value, count) in state.items():
                self.add({name: torch.tensor(value, dtype=torch.float64)}, count)


class Throughput:
    """Tokens through the trunk a second, from the first step after a line of the log to the next.

    An evaluation or a checkpoint that follows a line lies before that step, so it is not counted.
    """

    def __init__(self):
        self._start: float | None = None
        self._tokens = 0

    def start(self) -> None:
        """A step begins."""
        if self._start is None:
            self._start = time.perf_counter()

    def add(self, tokens: int) -> None:
        self._tokens += tokens

    def pop(self) -> dict[str, float]:
        """Nothing if no step was made since the last call."""
        if self._start is None:
            return {}
        rate = self._tokens / (time.perf_counter() - self._start)
        self._start, self._tokens = None, 0
        return {"tokens/second": rate}


class MetricsFile:
    """`metrics.jsonl`: one object a line, `step` in each; null for what is not finite."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, metrics: dict) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(_line(metrics))

    def rewrite(self, history: list[dict]) -> None:
        """Say what a checkpoint remembers, whatever a killed run left here."""
        if not history and not self.path.exists():
            return
        with Atomic(self.path, "0") as temporary:
            temporary.write_text("".join(map(_line, history)))


def _line(metrics: dict) -> str:
    rest = {name: metrics[name] for name in sorted(metrics) if name != "step"}
    line = {"step": metrics["step"], **{name: _or_null(value) for name, value in rest.items()}}
    return json.dumps(line, allow_nan=False) + "\n"


def _or_null(value):
    """JSON has no word for NaN and infinity, and other readers than Python's refuse Python's."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
