"""SePOTrainer: transformers' Trainer, with a step that is a fixed set of pairs.

The loader hands out step numbers only. What a step trains on follows from lengths, seed and step
number (`plan_step`), so resuming at step n is all it takes to continue.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from sepo.checkpoints import completed_step, last_checkpoint
from sepo.config import SePOConfig
from sepo.data.pack import pack
from sepo.data.plan import num_steps, plan_step
from sepo.data.read import read_pairs
from sepo.data.segments import make_segments, num_selected, num_tokens
from sepo.data.types import TokenPair
from sepo.errors import InputError
from sepo.methods import METHODS, Segments, reduce_segments
from sepo.metrics import MetricsFile, RunningMeans, pair_metrics
from sepo.model import prepare_model


class SePOTrainer(Trainer):
    """Train `model` by `args.method`. Raises InputError for data it can't use.

    Data sets are token pairs (a ScoredStore, or a list of TokenPair), or rows of any preference
    format as a datasets.Dataset, which are tokenised here.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: SePOConfig,
        train_dataset: Sequence[TokenPair] | Dataset | None = None,
        eval_dataset: Sequence[TokenPair] | Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        reference_model: PreTrainedModel | None = None,  # dpo: unless the pairs carry its logp
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
    ):
        self.method = METHODS[args.method]
        train_dataset, eval_dataset = (
            tokenised(data, args, processing_class) for data in (train_dataset, eval_dataset)
        )
        prepare_model(model)
        if args.disable_dropout:
            disable_dropout(model)
        self.train_pairs = None if train_dataset is None else PreparedPairs(train_dataset, args)
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.reference_model = None
        if reference_model is not None:
            reference_model = prepare_model(reference_model).eval().requires_grad_(False)
            self.reference_model = reference_model.to(args.device)
        self._means = RunningMeans()
        self._metrics_file = MetricsFile(Path(args.output_dir) / "metrics.jsonl")
        self._vocab_size = model.get_output_embeddings().weight.shape[0]

    # One step

    def training_step(
        self, model: nn.Module, inputs: dict, num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """Forward and backward of every micro-batch of this rank; gradients meet in the last."""
        model.train()
        pairs, world_size = self.train_pairs, self.args.world_size
        plan = plan_step(
            pairs.lengths,
            step=self.state.global_step,
            pairs_per_step=self.args.pairs_per_step,
            max_tokens=self.args.max_tokens_per_batch,
            seed=data_seed(self.args),
            world_size=world_size,
        )
        parts = plan.micro_batches[self.args.process_index]
        count = self._loss_count(pairs, plan.pairs)
        step_loss = torch.zeros((), device=self.args.device)
        for number, part in enumerate(parts, start=1):
            with nullcontext() if number == len(parts) else self.accelerator.no_sync(model):
                segments = self._segments(model, pairs, part)
                # DDP and FSDP average over ranks; the loss is a sum over them
                loss = self._losses(segments, self._means).sum() * (world_size / count)
                self.accelerator.backward(loss)
            step_loss += loss.detach()
        self._step_counts = {
            "tokens/read": int(pairs.lengths[plan.pairs].sum()),
            "tokens/selected": int(pairs.selected[plan.pairs].sum()),
            "rows/head": int(pairs.selected[plan.pairs].sum()),
        }
        return step_loss

    def _segments(self, model: nn.Module, pairs: "PreparedPairs", part: Sequence[int]) -> Segments:
        """Log-probabilities of one micro-batch, a number a segment."""
        batch = pack([pairs[i] for i in part], vocab_size=self._vocab_size).to(self.args.device)
        with self.compute_loss_context_manager():
            logp = model(batch=batch, budget=self.args.head_budget)
            ref_logp = batch.ref_logp
            if self.method.needs_reference and ref_logp is None:
                with torch.no_grad():
                    ref_logp = self._reference()(batch=batch, budget=self.args.head_budget)
        return reduce_segments(logp, batch.weights, ref_logp, batch.cu_rows)

    def _losses(self, segments: Segments, means: RunningMeans) -> Tensor:  # (P,)
        losses = self.method.loss(segments, self.args)
        reward = self.method.reward
        rewards = None if reward is None else reward(segments, self.args)
        means.add(pair_metrics(segments, losses, rewards), len(losses))
        return losses

    def _loss_count(self, pairs: "PreparedPairs", indices: np.ndarray) -> int:
        """What the step's sum of losses is divided by, the same on every rank."""
        return int(pairs.selected[indices].sum()) if self.method.per == "token" else len(indices)

    def _reference(self) -> PreTrainedModel:
        if self.reference_model is None:
            raise InputError(
                f"--method {self.args.method} needs a reference: pairs with cached log-"
                "probabilities (`sepo score --keep logp`), or reference_model="
            )
        return self.reference_model

    # What Trainer asks its subclasses

    def get_train_dataloader(self) -> DataLoader:
        """Step numbers of one epoch: they count the steps and let a resumed run skip."""
        if self.train_pairs is None:
            raise InputError("training needs train_dataset")
        steps = num_steps(len(self.train_pairs), self.args.pairs_per_step)
        return DataLoader(range(steps), batch_size=1, collate_fn=lambda step: {"step": step[0]})

    def get_total_train_batch_size(self, args: SePOConfig) -> int:
        return args.pairs_per_step

    def num_examples(self, dataloader: DataLoader) -> int:
        return len(self.train_pairs)

    def floating_point_ops(self, inputs: dict) -> int:
        """Six FLOP a parameter and token read, the usual estimate; the head is counted whole."""
        return 6 * self._step_counts["tokens/read"] * self.model.num_parameters()

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Sequence[TokenPair] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean loss and rewards over all pairs of all ranks, each pair counted once."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise InputError("evaluation needs eval_dataset")
        pairs, means, model = PreparedPairs(dataset, self.args), RunningMeans(), self.model_wrapped
        model.eval()
        plan = plan_step(
            pairs.lengths,
            step=0,
            pairs_per_step=len(pairs),
            max_tokens=self.args.max_tokens_per_batch,
            seed=0,
            world_size=self.args.world_size,
            shuffle=False,
        )
        for part in plan.micro_batches[self.args.process_index]:
            self._losses(self._segments(model, pairs, part), means)
        metrics = means.pop(self.accelerator)
        metrics["loss"] *= len(pairs) / self._loss_count(pairs, plan.pairs)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            means = self._means.pop(self.accelerator)
            means.pop("loss", None)  # Trainer's own, which weighs uneven steps as training did
            logs = {**logs, **means, **self._step_counts}
        super().log(logs, start_time)
        if self.is_world_process_zero():
            self._metrics_file.append({"step": self.state.global_step, **logs})

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train; `resume_from_checkpoint=True` takes the last complete checkpoint, if there is one.

        A checkpoint that a kill left half-written is passed over for the one before.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
        if self.is_world_process_zero():
            self._metrics_file.rewind(completed_step(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, **kwargs)


def tokenised(data, args: SePOConfig, tokenizer) -> Sequence[TokenPair] | None:
    """Token pairs as they are; rows of text read, and what was dropped of them printed."""
    if not isinstance(data, Dataset):
        return data
    read = read_pairs(data, tokenizer, max_length=args.max_length, append_eos=args.append_eos)
    if args.should_log:
        print(read.report)
    return read.pairs


class PreparedPairs(Sequence):
    """Pairs as a method reads them, with the lengths that the plan needs."""

    def __init__(self, pairs: Sequence[TokenPair], args: SePOConfig):
        if len(pairs) == 0:
            raise InputError("expected at least one pair, got an empty data set")
        self._pairs = [
            make_segments(
                pair,
                METHODS[args.method].positions,
                fraction=args.fraction,
                rejected_fraction=args.rejected_fraction,
                seed=data_seed(args),
            )
            for pair in pairs
        ]
        self.lengths = np.array([num_tokens(pair) for pair in self._pairs])  # (pairs,) read
        self.selected = np.array([num_selected(pair) for pair in self._pairs])  # (pairs,) used

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index):
        return self._pairs[index]


def data_seed(args: SePOConfig) -> int:
    """Seed of the order of the pairs and of sepo-rand's draw."""
    return args.seed if args.data_seed is None else args.data_seed


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to zero, attention's included."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
