"""Token masks of SparsePO (arXiv 2410.05102): learned, or read off the reference's activations."""

from sepo.masks.activation import activation_mask
from sepo.masks.files import MASK_FILE, load_into, load_mask, save_mask
from sepo.masks.kinds import MASK, ActivationMasks, DrawnMasks, LearnedMasks
from sepo.masks.learned import SparseMask, decayed
from sepo.masks.readers import layer_activations, layer_states, num_layers

__all__ = [
    "MASK", "MASK_FILE", "ActivationMasks", "DrawnMasks", "LearnedMasks", "SparseMask",
    "activation_mask", "decayed", "layer_activations", "layer_states", "load_into", "load_mask",
    "num_layers", "save_mask",
]  # fmt: skip
