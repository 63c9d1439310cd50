"""TRL's DPOTrainer with sepo's head, and then with SePO's loss.

trainer = SelectedTrainer(
    model,
    args=DPOConfig("runs/policy", remove_unused_columns=False, precompute_ref_log_probs=True),
    train_dataset=Dataset.from_list(list(masked_pairs(ScoredStore.open("runs/scored")))),
    processing_class=tokenizer,
    data_collator=MaskedPreference(pad_token_id=tokenizer.pad_token_id),
)
trainer.train()
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

import sepo.ops as ops
from examples.drop_in.inside_forward import add_selected_logprob
from examples.drop_in.minus_100 import UNUSED, selected


class HeadTrainer(DPOTrainer):
    """DPOTrainer whose policy takes sepo's head: the same loss and gradients."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        add_selected_logprob(self.model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise NotImplementedError("there are no logits to return")
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, UNUSED)
        trunk = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        logp, cu_rows = model(selected_labels=labels, **trunk)
        rewards, losses = self.pair_losses(model, inputs, logp, cu_rows)
        self._note(rewards.detach())
        return losses.mean()

    def pair_losses(
        self, model, inputs, logp: Tensor, cu_rows: Tensor
    ) -> tuple[Tensor, Tensor]:  # rewards (2 P,), losses (P,)
        """DPO. TRL lays all chosen sequences before all rejected ones."""
        if self.precompute_ref_logps:
            reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            reference = self.compute_ref_log_probs(self.ref_model or model, inputs)
        logratio = _alternating(ops.segment_sum(logp, cu_rows) - torch.cat(reference))
        return self.beta * logratio, ops.dpo_loss(logratio, beta=self.beta)

    def _note(self, rewards: Tensor) -> None:  # (2 P,)
        chosen, rejected = (self.accelerator.gather(x) for x in rewards.view(-1, 2).unbind(1))
        log = self._metrics["train" if self.model.training else "eval"]
        log["rewards/margins"].append((chosen - rejected).mean().item())
        log["rewards/accuracies"].append((chosen > rejected).float().mean().item())


class SelectedTrainer(HeadTrainer):
    """SePO: the selected tokens of `masked_pairs`, no reference, over token ids as they are."""

    gamma, margin = 2.0, 0.5

    def pair_losses(self, model, inputs, logp, cu_rows):
        score = self.gamma * _alternating(ops.segment_mean(logp, cu_rows))
        return score, ops.sepo_loss(score, gamma=1.0, margin=self.margin)

    def _prepare_dataset(self, dataset, *args):
        return dataset  # tokenised when it was scored; other tokens would have other scores

    def _precompute_ref_logps(self, dataset, *args):
        return dataset  # with precompute_ref_log_probs=True TRL keeps no second model either


def masked_pairs(store, fraction: float = 0.3) -> Iterator[dict]:
    """Rows of token ids, each response cut after its last selected token, and which are selected."""
    for pair in store:
        row = {"prompt_ids": pair.prompt.tolist()}
        for side, positions in zip(("chosen", "rejected"), selected(pair, fraction), strict=True):
            length = positions[-1] + 1
            row[f"{side}_ids"] = getattr(pair, side)[:length].tolist()
            row[f"{side}_mask"] = np.isin(np.arange(length), positions).astype(int).tolist()
        yield row


@dataclass
class MaskedPreference(DataCollatorForPreference):
    """TRL's collator; a response's tokens count where its mask is 1."""

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        masks = [example[f"{side}_mask"] for side in ("chosen", "rejected") for example in examples]
        prompts = [len(example["prompt_ids"]) for example in examples] * 2
        for row, prompt, mask in zip(batch["completion_mask"], prompts, masks, strict=True):
            kept = row[prompt : prompt + len(mask)]  # TRL may have cut it at max_length
            kept *= torch.tensor(mask[: len(kept)])
        return batch


def _alternating(values: Tensor) -> Tensor:  # (2 P,), chosen first -> chosen, rejected, ...
    return values.view(2, -1).T.flatten()
