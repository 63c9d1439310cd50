"""Name what a plan is made of: a recipe, and a few more keys."""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import yaml

from sepo.cost import lengths
from sepo.cost.gpu import UTILISATION
from sepo.errors import InputError
from sepo.flags.renamed import NAMES, today
from sepo.trainer.config import SePOConfig


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
    scoring_arithmetic: str = "float32"  # or split: its products from 16-bit halves
    bfloat16_checkpoints: bool = False  # reference and oracle are exact in it: fewer products
    tokens_per_second: float | None = None  # of one GPU, through the trunk, of a measured step


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
