"""Every phase of a run in which a kill could do harm, and how to stop a process inside it."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from sepo.trainer import metrics, trainer
from sepo.trainer import resume as resumable


@dataclass(frozen=True)
class Phase:
    """Steps are those of tests/trainer/test_resume.py: 12 of them, 6 an epoch, a checkpoint every 2."""

    stop: Callable[[Callable], None]  # patches this process, so that it pauses there
    checkpoint: str | None  # the last whole one that the kill leaves
    rank: int = 0  # of two


def stop_in_phase(name: str, rank: int | None, paused: Path) -> None:
    """Pause in the phase, if this rank is the one to be killed: `paused` appears."""

    def pause():
        paused.touch()
        signal.pause()

    if rank is None or rank == PHASES[name].rank:
        PHASES[name].stop(pause)


def _before(owner, function: str, when: Callable[..., bool]):
    def stop(pause):
        original = getattr(owner, function)

        def stopping(*args, **kwargs):
            if when(*args):
                pause()
            return original(*args, **kwargs)

        setattr(owner, function, stopping)

    return stop


def _torn(owner, function: str, file: str, argument: int = 1):
    """Half of a file is on the disk."""

    def stop(pause):
        original = getattr(owner, function)

        def tearing(*args, **kwargs):
            original(*args, **kwargs)
            path = str(args[argument])
            if path.endswith(file):
                os.truncate(path, os.path.getsize(path) // 2)
                pause()

        setattr(owner, function, tearing)

    return stop


def _mid_optimiser(pause):
    original, calls = torch.optim.AdamW.step, iter(range(100))

    def stopping(*args, **kwargs):
        result = original(*args, **kwargs)
        if next(calls) == 4:
            pause()
        return result

    torch.optim.AdamW.step = stopping


def _mid_rotation(pause):
    def stopping(output_dir, limit, *args):
        checkpoints = sorted(Path(output_dir).glob("checkpoint-*"))
        if len(checkpoints) > limit:
            (checkpoints[0] / "optimizer.pt").unlink()
            pause()

    resumable.rotate = stopping


def _mid_line(pause):
    original, calls = metrics.MetricsFile.append, iter(range(100))

    def stopping(self, entry):
        original(self, entry)
        if next(calls) == 3:
            os.truncate(self.path, self.path.stat().st_size - 20)
            pause()

    metrics.MetricsFile.append = stopping


_training = lambda self, *of: of[-1] is self._means and self.state.global_step == 5
_evaluating = lambda self, *of: of[-1] is not self._means and bool(of[-1].state())
PHASES = {
    "before the first checkpoint": Phase(
        _before(trainer.SePOTrainer, "_losses", lambda self, *_: self.state.global_step == 1), None
    ),
    "forward": Phase(_before(trainer.SePOTrainer, "_losses", _training), "checkpoint-4", rank=1),
    "optimiser step": Phase(_mid_optimiser, "checkpoint-4", rank=1),
    "weights": Phase(
        _torn(transformers.modeling_utils, "safe_save_file", "checkpoint-4/model.safetensors"),
        "checkpoint-2",
    ),
    "optimiser state": Phase(_torn(torch, "save", "checkpoint-4/optimizer.pt"), "checkpoint-2"),
    "generators": Phase(
        _before(torch, "save", lambda _, file: "checkpoint-4/rng_state" in str(file)),
        "checkpoint-2",
        rank=1,
    ),
    "mark": Phase(
        _before(resumable, "write_mark", lambda folder: folder.name == "checkpoint-4"),
        "checkpoint-2",
    ),
    "rotation": Phase(_mid_rotation, "checkpoint-4"),
    "evaluation": Phase(_before(trainer.SePOTrainer, "_losses", _evaluating), "checkpoint-4"),
    "a line of the log": Phase(_mid_line, "checkpoint-8"),
}
