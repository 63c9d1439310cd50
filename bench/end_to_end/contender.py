"""A contender: forward and backward of a round, and what that round makes it do."""

import shutil
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Work:
    """Of one round."""

    tokens: int  # positions that the policy's trunk computes, padding included
    rows: int  # of them through the head
    flops: float  # that the model has to compute: no padding, no recomputation


@dataclass
class Contender:
    """`step` adds gradients to the shared weights; the end of the step is common to all."""

    name: str
    group: str  # "trl" | "dense" | "sepo" | "savings"
    objective: str  # a method of sepo.trainer.methods.METHODS
    step: Callable[[int], Tensor] | None  # round -> loss; None: it can't run here
    work: Callable[[int], Work] | None
    absent: str = ""  # why it can't run
    attention: str = ""  # the implementation, where the name leaves it open
    lower: Callable[[], None] = lambda: None  # from float32, where the gate compares, to bfloat16
    float32: bool = True  # it can be compared in float32
    keeps_bytes: int = 0  # beside the policy: a reference model
    turns: int | None = None  # timed rounds at most; None: all; 0: its memory alone is asked for
    note: str = ""

    @property
    def label(self) -> str:
        """No other's."""
        return f"{self.name} ({self.attention})" if self.attention else self.name


class Folder:
    """A folder that goes with the last who knows of it; a TemporaryDirectory would warn of that."""

    def __init__(self):
        self.name = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, self.name, ignore_errors=True)
