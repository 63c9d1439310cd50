"""Train: transformers' Trainer with a step that is a fixed set of pairs."""

from sepo.errors import needs

with needs("train", "sepo.trainer"):
    from sepo.trainer.trainer import SePOTrainer

__all__ = ["SePOTrainer"]
