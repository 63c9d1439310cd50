"""transformers' Trainer with SePO's loss and this library's head."""

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

import sepo.ops as ops
from sepo.patch._transformers import is_patched, transformers


class PairTrainer(Trainer):
    """transformers' Trainer on batches whose sequences alternate: chosen, rejected.

        trainer = PairTrainer(
            model,
            TrainingArguments("runs/policy", remove_unused_columns=False),
            train_dataset=Dataset.from_json("selected.jsonl"),  # of labelled_pairs
            data_collator=collate_pairs,
        )

    Args:
        args: Trainer's own, in its order.
        gamma: scale of the score difference, per nat.
        margin: the paper's lambda, in units of gamma times a score.
        kwargs: Trainer's own.

    Raises:
        InputError: for a model that `sepo.patch.transformers` refuses.
    """

    def __init__(self, *args: Any, gamma: float = 2.0, margin: float = 0.5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        policy: Any = self.model
        if not is_patched(policy):
            transformers(policy)
        self.gamma, self.margin = gamma, margin
        # the loss is a mean over a micro-batch; else Trainer takes it for a share of the step's
        # mean, and accumulated gradients come out too large by the number of micro-batches
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        inputs = dict(inputs)
        logp, cu_rows = model(selected_labels=inputs.pop("labels"), **inputs)
        mean_logp = ops.segment_mean(logp, cu_rows)
        loss = ops.sepo_loss(mean_logp, gamma=self.gamma, margin=self.margin).mean()
        return (loss, {"mean_logp": mean_logp.view(-1, 2)}) if return_outputs else loss
