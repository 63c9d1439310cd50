"""What a run reports: means over all pairs of all ranks, and one JSON line a log."""

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from sepo.methods import Segments


def pair_metrics(
    segments: Segments,
    losses: Tensor,  # (P,)
    rewards: Tensor | None,  # (S,), None: the method compares nothing
) -> dict[str, Tensor]:
    """Sums over the pairs, under TRL's names."""
    logp_chosen, logp_rejected = segments.logp.view(-1, 2).unbind(1)
    sums = {"loss": losses.sum(), "logps/chosen": logp_chosen.sum()}
    if rewards is None:
        return sums
    chosen, rejected = rewards.view(-1, 2).unbind(1)
    return {
        **sums,
        "logps/rejected": logp_rejected.sum(),
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/margins": (chosen - rejected).sum(),
        "rewards/accuracies": (chosen > rejected).sum(),
    }


class RunningMeans:
    """Sums kept on the device; one all-reduce and one transfer when they are read."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, sums: dict[str, Tensor], count: int) -> None:
        for name, value in sums.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += count

    def pop(self, accelerator) -> dict[str, float]:
        """Means over every rank's pairs since the last call. Every rank must call it."""
        names = sorted(self._sums)  # not in the order of arrival, which ranks may differ in
        if not names:
            return {}
        values = torch.stack([self._sums[name].to(accelerator.device) for name in names])
        packed = torch.cat([values, values.new_tensor([self._count])])
        *sums, count = accelerator.reduce(packed, "sum").tolist()
        self.__init__()
        return {name: value / max(count, 1) for name, value in zip(names, sums, strict=True)}

    def state(self) -> list:
        """This rank's part, for JSON: [[sums by name, count]], [] if there is none."""
        sums = {name: value.item() for name, value in self._sums.items()}
        return [[sums, self._count]] if sums else []

    def restore(self, states: list) -> None:
        """Add what `state` returned, of as many ranks as there were."""
        for sums, count in states:
            self.add(
                {name: torch.tensor(v, dtype=torch.float64) for name, v in sums.items()}, count
            )


class MetricsFile:
    """`metrics.jsonl`: one object a line, `step` in each."""

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
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(map(_line, history)))
        os.replace(temporary, self.path)


def _line(metrics: dict) -> str:
    rest = {name: metrics[name] for name in sorted(metrics) if name != "step"}
    return json.dumps({"step": metrics["step"], **rest}) + "\n"
