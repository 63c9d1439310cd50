"""Train: transformers' Trainer with a step that is a fixed set of pairs."""

from sepo.trainer.trainer import SePOTrainer

__all__ = ["SePOTrainer"]
