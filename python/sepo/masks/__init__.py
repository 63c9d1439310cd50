"""Masks on tokens: SparsePO's (arXiv 2410.05102), MaPO's, and rules that read the policy itself."""

from sepo.masks.activation import activation_mask
from sepo.masks.files import MASK_FILE, load_into, load_mask, save_mask
from sepo.masks.kinds import MASK, ActivationMasks, DrawnMasks, LearnedMasks
from sepo.masks.learned import SparseMask, decayed
from sepo.masks.readers import layer_activations, layer_states, num_layers
from sepo.masks.rules import (
    AboveQuantile,
    BelowMean,
    HighestEntropy,
    above_quantile,
    below_mean_probability,
)

__all__ = [
    "MASK", "MASK_FILE", "AboveQuantile", "ActivationMasks", "BelowMean", "DrawnMasks",
    "HighestEntropy", "LearnedMasks", "SparseMask", "above_quantile", "activation_mask", "below_mean_probability",
    "decayed", "layer_activations", "layer_states", "load_into", "load_mask", "num_layers",
    "save_mask",
]  # fmt: skip
