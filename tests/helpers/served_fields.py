"""What shows that a field of TrainingArguments does as transformers documents, by its name."""

import inspect
from dataclasses import fields
from pathlib import Path

from tiny_trainer import make_trainer
from transformers import TrainingArguments

from sepo import SePOConfig
from sepo.trainer.trainer import SePOTrainer

THEIRS = {field.name: field for field in fields(TrainingArguments) if field.init}
EFFECTS = {}  # field -> what shows it


def shows(*names: str):
    """Register what shows that the fields of these names do as transformers documents."""

    def register(check):
        EFFECTS.update(dict.fromkeys(names, check))
        return check

    return register


class Run:
    """Train on 13 pairs, 5 a step: 3 steps an epoch."""

    def __init__(self, path: Path):
        self.path, self.count = path, 0

    def make(self, **args) -> SePOTrainer:
        self.count += 1
        return make_trainer(self.path / str(self.count), **args)

    def __call__(self, **args) -> SePOTrainer:
        made = self.make(**args)
        made.train()
        return made


def logged(done: SePOTrainer, what: str) -> list:
    return [entry[what] for entry in done.state.log_history if what in entry]


def steps_with(done: SePOTrainer, what: str) -> list[int]:
    return [entry["step"] for entry in done.state.log_history if what in entry]


def checkpoints(done: SePOTrainer) -> list[str]:
    return sorted(path.name for path in Path(done.args.output_dir).glob("checkpoint-*"))


def read_by(function, *, name: str) -> None:
    """The field is read by code of transformers that SePOTrainer leaves as it is."""
    function = getattr(function, "fget", function)  # of a property
    home = function.__qualname__.split(".")[0]
    ours = {"Trainer": SePOTrainer, "TrainingArguments": SePOConfig}.get(home)
    if ours is not None:
        found = inspect.getattr_static(ours, function.__name__)
        assert getattr(found, "func", getattr(found, "fget", found)) is function
    assert f".{name}" in inspect.getsource(function)
