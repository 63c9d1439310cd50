"""This library's head and selection inside other people's models, trainers and loops.

    transformers(model)   a transformers model's loss and log-probabilities of labels, no logits
    trl()                 TRL's trainers on this head: their own losses, gradients and metrics
    PairTrainer           transformers' Trainer with SePO's loss
    SelectedDPOTrainer    TRL's DPOTrainer with SePO's loss
    HeadDPOTrainer        what it is made from: TRL's own loss on this head
    labelled_pairs, collate_pairs, masked_pairs, MaskedPreferenceCollator
                          a scored store in the form that such trainers read

TRL is loaded when one of its classes is first named, or by `trl()`. A model or a version that is
not known is refused by name, in one line.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sepo.patch._labels import collate_pairs, labelled_pairs, masked_pairs
from sepo.patch._replace import Patch
from sepo.patch._trainer import PairTrainer
from sepo.patch._transformers import LabelLogprob, transformers
from sepo.patch._trl_patch import trl

if TYPE_CHECKING:
    from sepo.patch._trl import HeadDPOTrainer, MaskedPreferenceCollator, SelectedDPOTrainer

__all__ = [
    "HeadDPOTrainer",
    "LabelLogprob",
    "MaskedPreferenceCollator",
    "PairTrainer",
    "Patch",
    "SelectedDPOTrainer",
    "collate_pairs",
    "labelled_pairs",
    "masked_pairs",
    "transformers",
    "trl",
]

_HOME = dict.fromkeys(
    ("HeadDPOTrainer", "MaskedPreferenceCollator", "SelectedDPOTrainer"), "sepo.patch._trl"
)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sepo.patch' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*_HOME, *globals()} - {"TYPE_CHECKING", "Any", "importlib"})
