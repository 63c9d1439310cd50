"""TRL's DPOTrainer with this library's head, and then with SePO's loss."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sepo.ops as ops
from sepo.patch._labels import SIDES, UNUSED
from sepo.patch._replace import check_version
from sepo.patch._transformers import is_patched, transformers
from sepo.patch._trl_patch import KNOWN

check_version("trl", KNOWN)  # before names that another version need not have

from trl import DPOTrainer  # noqa: E402
from trl.trainer.dpo_trainer import DataCollatorForPreference  # noqa: E402


class HeadDPOTrainer(DPOTrainer):
    """TRL's DPOTrainer whose policy takes this head: the same loss and gradients.

    Takes DPOTrainer's arguments, for `loss_type="sigmoid"`. Of its metrics only
    rewards/accuracies and rewards/margins are logged.

    Raises:
        InputError: for a TRL version that is not known, or a model that `sepo.patch.transformers`
            refuses.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        policy: Any = self.model
        if not is_patched(policy):
            transformers(policy)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        if return_outputs:
            raise NotImplementedError("there are no logits to return")
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, UNUSED)
        trunk = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        logp, cu_rows = model(selected_labels=labels, **trunk)
        rewards, losses = self.pair_losses(model, inputs, logp, cu_rows)
        self._note(rewards.detach())
        return losses.mean()

    def pair_losses(
        self, model: torch.nn.Module, inputs: dict[str, Any], logp: Tensor, cu_rows: Tensor
    ) -> tuple[Tensor, Tensor]:  # rewards (2 P,), losses (P,)
        """Return DPO's. TRL lays all chosen sequences before all rejected ones."""
        if self.precompute_ref_logps:
            reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            reference = self.compute_ref_log_probs(self.ref_model or model, inputs)
        logratio = _alternating(ops.segment_sum(logp, cu_rows) - torch.cat(reference))
        return self.beta * logratio, ops.dpo_loss(logratio, beta=self.beta)

    def _note(self, rewards: Tensor) -> None:  # (2 P,)
        chosen, rejected = (self.accelerator.gather(x) for x in rewards.view(-1, 2).unbind(1))
        policy: Any = self.model
        log = self._metrics["train" if policy.training else "eval"]
        log["rewards/margins"].append((chosen - rejected).mean().item())
        log["rewards/accuracies"].append((chosen > rejected).float().mean().item())


class SelectedDPOTrainer(HeadDPOTrainer):
    """SePO in TRL's DPOTrainer: the selected tokens of `masked_pairs`, no reference.

        trainer = SelectedDPOTrainer(
            model,
            args=DPOConfig(
                "runs/policy", remove_unused_columns=False, precompute_ref_log_probs=True
            ),
            train_dataset=Dataset.from_list(list(masked_pairs(ScoredStore.open("runs/scored")))),
            processing_class=tokenizer,
            data_collator=MaskedPreferenceCollator(pad_token_id=tokenizer.pad_token_id),
        )

    `gamma` and `margin` are attributes of the class: the scale of the score difference, per nat,
    and the paper's lambda.
    """

    gamma, margin = 2.0, 0.5

    def pair_losses(
        self, model: torch.nn.Module, inputs: dict[str, Any], logp: Tensor, cu_rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        reward = self.gamma * _alternating(ops.segment_mean(logp, cu_rows))
        return reward, ops.sepo_loss(reward, gamma=1.0, margin=self.margin)

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset  # tokenised when it was scored; other tokens would have other scores

    def _precompute_ref_logps(self, dataset: Any, *args: Any) -> Any:
        return dataset  # with precompute_ref_log_probs=True TRL keeps no second model either


@dataclass
class MaskedPreferenceCollator(DataCollatorForPreference):
    """TRL's collator on rows of `masked_pairs`; a response's tokens count where its mask is 1."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        masks = [example[f"{side}_mask"] for side in SIDES for example in examples]
        prompts = [len(example["prompt_ids"]) for example in examples] * len(SIDES)
        for row, prompt, mask in zip(batch["completion_mask"], prompts, masks, strict=True):
            kept = row[prompt : prompt + len(mask)]  # TRL may have cut it at max_length
            kept *= torch.tensor(mask[: len(kept)])
        return batch


def _alternating(values: Tensor) -> Tensor:  # (2 P,), chosen first -> chosen, rejected, ...
    return values.view(2, -1).T.flatten()
