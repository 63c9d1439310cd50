"""Token-level preference optimisation: select first, compute after.

`import sepo` is cheap: the trainer, and with it transformers, is loaded when it is first named.
"""

import importlib

from sepo.errors import needs

__version__ = "0.1.0"
__all__ = ["SePOConfig", "SePOTrainer"]

_HOME = {"SePOConfig": "sepo.config", "SePOTrainer": "sepo.trainer"}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'sepo' has no attribute '{name}'")
    with needs("train", f"sepo.{name}"):
        return getattr(importlib.import_module(_HOME[name]), name)
