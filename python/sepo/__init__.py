"""Token-level preference optimisation: select first, compute after.

`import sepo` is cheap: the trainer, and with it transformers, is loaded when it is first named.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what a type checker and an editor see; `__getattr__` gives the same
    from sepo.trainer.config import SePOConfig
    from sepo.trainer.trainer import SePOTrainer

from sepo import _moved
from sepo.errors import needs

__version__ = "0.1.0"
__all__ = ["SePOConfig", "SePOTrainer"]

_HOME = {"SePOConfig": "sepo.trainer.config", "SePOTrainer": "sepo.trainer"}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'sepo' has no attribute '{name}'")
    with needs("train", f"sepo.{name}"):
        return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME} - {"TYPE_CHECKING", "importlib", "needs", "_moved"})


_moved.install()
