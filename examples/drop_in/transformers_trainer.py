"""transformers' Trainer with SePO's loss and sepo's head, on pairs from `minus_100.py`.

from datasets import Dataset

trainer = PairTrainer(
    model,
    TrainingArguments("runs/policy", per_device_train_batch_size=8, remove_unused_columns=False),
    train_dataset=Dataset.from_json("selected.jsonl"),
    data_collator=collate_pairs,
)
trainer.train()
"""

from transformers import Trainer

import sepo.ops as ops
from examples.drop_in.inside_forward import add_selected_logprob


class PairTrainer(Trainer):
    """A Trainer on batches whose sequences alternate: chosen, rejected."""

    def __init__(self, *args, gamma: float = 2.0, margin: float = 0.5, **kwargs):
        super().__init__(*args, **kwargs)
        add_selected_logprob(self.model)
        self.gamma, self.margin = gamma, margin
        # the loss is a mean over a micro-batch; else Trainer takes it for a share of the step's
        # mean, and accumulated gradients come out as many times too large as there are micro-batches
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        logp, cu_rows = model(selected_labels=inputs.pop("labels"), **inputs)
        score = ops.segment_mean(logp, cu_rows)
        loss = ops.sepo_loss(score, gamma=self.gamma, margin=self.margin).mean()
        return (loss, {"score": score.view(-1, 2)}) if return_outputs else loss
