"""SePOTrainer: transformers' Trainer, with a step that is a fixed set of pairs.

The loader hands out step numbers only. What a step trains on follows from lengths, seed and step
number (`plan_step`), so resuming at step n is all it takes to continue.
"""

import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from accelerate.utils import TorchDynamoPlugin, gather_object, parse_flag_from_env
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments, set_seed

from sepo.data.cost import attention_share
from sepo.data.pack import pack
from sepo.data.plan import StepPlan, num_steps, plan_step
from sepo.data.types import PackedBatch, TokenPair
from sepo.errors import InputError, in_their_words
from sepo.flags.options import say_idle
from sepo.model.base import base_of
from sepo.model.budget import default_budget
from sepo.model.feed import StepFeed, feed
from sepo.model.forward import restore_attention, vocabulary
from sepo.model.reads import TokenValues
from sepo.model.reference import LiveReference, Reference, ReferenceFolder, resolve_reference
from sepo.model.routers import router_loss
from sepo.trainer.accepted import check_best_metric, check_kinds, each, tokenised
from sepo.trainer.adapters import add_adapters, check_adapters
from sepo.trainer.config import SePOConfig
from sepo.trainer.fused import compile_parts, place_and_prepare, settle_layers
from sepo.trainer.identity import describe_run
from sepo.trainer.layers import checkpoint_selectively, disable_dropout
from sepo.trainer.mask import MaskedTrainer, add_mask
from sepo.trainer.methods import METHODS, idle_settings, reduce_segments
from sepo.trainer.metrics import RunningMeans, Throughput, pair_metrics, token_metrics
from sepo.trainer.pairs import PreparedPairs, data_seed
from sepo.trainer.step import not_finite, step_reads

if TYPE_CHECKING:
    from datasets import Dataset  # which only who has rows in it needs


class SePOTrainer(MaskedTrainer):
    """Train `model` by `args.method`. Raises InputError for data it can't use.

    Data sets are token pairs (a ScoredStore, or a list of TokenPair), or rows of any preference
    format as a datasets.Dataset, IterableDataset or list of dicts, which are tokenised here. With a
    peft_config (peft's LoraConfig) the model is frozen and adapters are trained; then, unless a
    reference is given, the model without them is the reference, and no second copy is held.
    """

    def __init__(
        self,
        model: nn.Module,  # of transformers, or a PeftModel around one
        args: SePOConfig,
        train_dataset: "Sequence[TokenPair] | Dataset | None" = None,
        # several are evaluated one after the other, by name: eval_NAME_loss
        eval_dataset: "Sequence[TokenPair] | Dataset | dict | None" = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        # unless the pairs carry what the method reads of it; with what a store keeps of it, no model
        reference_model: nn.Module | Reference | ReferenceFolder | None = None,
        peft_config=None,  # peft.PeftConfig
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
    ):
        check_kinds(model, args, eval_dataset)
        self.method = METHODS[args.method]
        check_best_metric(args, self.method, eval_dataset)
        if args.should_log:
            say_idle(idle_settings(args))
        train_dataset = tokenised(train_dataset, args, processing_class)
        eval_dataset = each(tokenised, eval_dataset, args, processing_class)
        if args.disable_dropout:
            disable_dropout(model)
        check_adapters(model, peft_config)
        if peft_config is not None:
            set_seed(args.seed)  # Trainer does so later, when the adapters are drawn
            model = add_adapters(model, peft_config)
        self.explained = {"layers": settle_layers(args, model)}
        place_and_prepare(model, args)
        self.reference = resolve_reference(
            self.method.reference, reference_model, model, train_dataset, method=args.method
        )
        models = {"policy": model}
        if isinstance(self.reference, LiveReference) and self.reference.model is not model:
            models["reference"] = self.reference.model
            place_and_prepare(self.reference.model, args, policy=False)
        if args.max_tokens_per_batch is None:
            budget, why = default_budget(base_of(model), args, models.get("reference"))
            args.max_tokens_per_batch, self.explained["micro-batches"] = budget, why
        # all of it before Trainer makes the output directory: bad data leaves nothing behind
        self._attention = attention_share(model)
        self._router_loss = router_loss(model)
        self._vocabularies = {role: vocabulary(one) for role, one in models.items()}
        self.train_pairs = self._prepared(train_dataset, args)
        self._eval_pairs = each(self._prepared, eval_dataset, args)
        if self.method.mask == "learned" and args.mask_kind != "random":
            assert isinstance(self.reference, LiveReference)  # its layers are read
            add_mask(model, self.reference.model, args)
        self._reads = step_reads(self.method, args, self.reference, self._router_loss)
        run = None if self.train_pairs is None else describe_run(
            model, args, self.train_pairs, data=train_dataset, reference=self.reference,
            read=args.process_index == 0,
        )  # fmt: skip
        super().__init__(
            model,
            args,
            run=run,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.args.logging_nan_inf_filter = False  # see _get_grad_norm
        self._throughput = Throughput()
        parts_of = lambda step: self._parts(self._train_plan(step))
        self._feed = StepFeed(parts_of, lambda parts: self._batches(self._to_train, parts))
        if args.selective_checkpointing:
            checkpoint_selectively(base_of(model))
        for one in models.values():
            compile_parts(one, args, self.accelerator)
        # accelerate would compile the model whole: for every batch anew
        self.accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")

    # One step

    def training_step(
        self, model: nn.Module, inputs: dict, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of every micro-batch of this rank; gradients meet in the last."""
        self._throughput.start()
        model.train()
        self._switch_optimizer("train")
        pairs, world_size = self._to_train, self.args.world_size
        plan = self._train_plan(self.state.global_step)
        parts, count = self._parts(plan), self._loss_count(pairs, plan.pairs)
        batches = self._feed.of(self.state.global_step, self.state.max_steps)
        step_loss, self._pair_losses = torch.zeros((), device=self.args.device), []
        for number, part in enumerate(parts, start=1):
            with nullcontext() if number == len(parts) else self._unsynchronised(model):
                batch = next(batches)
                with self._autocast():
                    tokens = model(batch=batch, reads=self._reads)
                losses = self._losses(tokens, batch, self._means)
                # DDP and FSDP average over ranks; the loss is a sum over them
                loss = losses.sum() * (world_size / count)
                self.accelerator.backward(loss)
            step_loss += loss.detach()
            self._pair_losses.append((part, losses.detach()))
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        self._step_counts = {
            "tokens/read": int(pairs.lengths[plan.pairs].sum()),
            "tokens/selected": int(pairs.selected[plan.pairs].sum()),
            "rows/head": int(pairs.selected[plan.pairs].sum()),
        }
        self._throughput.add(self._step_counts["tokens/read"])
        self._step_loss, self._step_pairs = step_loss, plan.pairs
        return step_loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None):
        """Trainer's, before the optimiser's step: a step that is not finite ends the run here.

        The one wait of a step for the device, in place of those by which Trainer would log a loss
        of 0 instead (logging_nan_inf_filter).
        """
        norm = super()._get_grad_norm(model, grad_norm)
        values = [self._step_loss]
        # under float16 an infinite one only tells the scaler to go on with a smaller scale
        if norm is not None and self.accelerator.scaler is None:
            whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
            values.append(torch.as_tensor(whole, device=self.args.device))
        if not torch.stack([value.isfinite() for value in values]).all():
            self._refuse_step(*(value.item() for value in values))
        return norm

    def _refuse_step(self, loss: float, norm: float = 0.0) -> NoReturn:
        row = lambda i: self._to_train.name(int(i))
        mine = [
            f"{row(i)} ({value})"
            for part, losses in self._pair_losses
            for i, value in zip(part, losses.tolist(), strict=True)
            if not math.isfinite(value)
        ]
        if not math.isfinite(norm):  # then it is on every rank, and any of them may have the pair
            mine = gather_object(mine)
        whose, rows = "loss of", mine
        if not mine:
            whose = f"gradient (norm {norm}) and loss ({loss}) of all of"
            rows = [row(i) for i in self._step_pairs]
        raise not_finite(self.state.global_step + 1, whose, rows, self._whole())

    def _switch_optimizer(self, mode: str) -> None:
        """Schedule-free optimisers keep other weights to train than to evaluate."""
        if callable(switch := getattr(self.optimizer, mode, None)):
            switch()

    @contextmanager
    def _unsynchronised(self, model: nn.Module) -> Iterator[None]:
        """Gradients of a micro-batch that is not the step's last stay where they are."""
        gradients = self.accelerator.gradient_state
        gradients._set_sync_gradients(False)  # else DeepSpeed steps its optimiser in backward
        with self.accelerator.no_sync(model):
            yield
        gradients._set_sync_gradients(True)

    @property
    def _to_train(self) -> PreparedPairs:
        """The pairs of a trainer that has some to train on."""
        if self.train_pairs is None:
            raise InputError("training needs train_dataset")
        return self.train_pairs

    def _train_plan(self, step: int) -> StepPlan:
        return self._plan(self._to_train, self.args.pairs_per_step, step=step)

    def _plan(
        self, pairs: PreparedPairs, pairs_per_step: int, *, step: int = 0, shuffle: bool = True
    ) -> StepPlan:
        return plan_step(
            pairs.lengths,
            step=step,
            pairs_per_step=pairs_per_step,
            max_tokens=self.args.max_tokens_per_batch,
            seed=data_seed(self.args),
            world_size=self.args.world_size,
            shuffle=shuffle,
            costs=pairs.costs,
        )

    def _parts(self, plan: StepPlan) -> Sequence[Sequence[int]]:
        return plan.micro_batches[self.args.process_index]

    def _batches(
        self, pairs: PreparedPairs, parts: Iterable[Sequence[int]]
    ) -> Generator[PackedBatch]:
        size = self._vocabularies["policy"]
        packed = lambda part: pack([pairs[i] for i in part], vocab_size=size)
        live = [self.reference.model] if isinstance(self.reference, LiveReference) else []
        return feed(
            (partial(packed, part) for part in parts),
            self.args.device,
            [self.model, *live],
            mixed_precision=self.accelerator.mixed_precision,
        )

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        # accelerate casts in the policy's forward alone, but the reference runs in there too
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            yield

    def _losses(
        self, tokens: TokenValues, batch: PackedBatch, means: RunningMeans
    ) -> Tensor:  # (P,) of one micro-batch
        sums = reduce_segments(tokens, batch.weights, batch.cu_rows)
        losses = self.method.loss(sums, self.args)
        if self._router_loss is not None and tokens.router_loss is not None:
            routers = self._per_pair(tokens.router_loss, batch)
            losses = losses + self._router_loss.coefficient * routers
        reward = self.method.reward
        rewards = None if reward is None else reward(sums, self.args)
        means.add(pair_metrics(sums, losses, rewards, tokens), len(losses))
        means.add(token_metrics(tokens), len(batch.rows))
        return losses

    def _per_pair(self, router_loss: Tensor, batch: PackedBatch) -> Tensor:  # (P,) both
        """The router's loss, for a sum that `_loss_count` will make a mean."""
        if self.method.per == "pair":
            return router_loss
        return router_loss * batch.cu_rows.diff().view(-1, 2).sum(1)

    def _loss_count(self, pairs: PreparedPairs, indices: np.ndarray) -> int:
        """Count what the step's sum of losses is divided by, the same on every rank."""
        return int(pairs.selected[indices].sum()) if self.method.per == "token" else len(indices)

    def _prepared(self, data: Sequence[TokenPair] | None, args: SePOConfig) -> PreparedPairs | None:
        if data is None:
            return None
        return PreparedPairs(data, args, attention=self._attention, vocabularies=self._vocabularies)

    def train(self, *args, **kwargs):
        """As ResumableTrainer's; afterwards the model answers any call, `generate` among them."""
        try:
            done = super().train(*args, **kwargs)
        finally:
            self._feed.close()
        self.model.eval()  # checkpointed layers in training keep no cache
        restore_attention(self.model)
        return done

    # What Trainer asks its subclasses

    def create_accelerator_and_postprocess(self) -> None:
        with in_their_words():
            super().create_accelerator_and_postprocess()
        asked = parse_flag_from_env("ACCELERATE_USE_FSDP", bool(self.args.fsdp))
        if asked and self.args.world_size > 1 and not self.is_fsdp_enabled:
            raise InputError(
                f"--fsdp: expected GPUs to shard over, got {self.args.world_size} ranks on "
                f"{self.args.device}, which accelerate would train unsharded"
            )

    def _validate_args(self) -> None:
        with in_their_words():
            super()._validate_args()

    def init_hf_repo(self, *args, **kwargs) -> None:
        with in_their_words("--push_to_hub: "):
            super().init_hf_repo(*args, **kwargs)

    def _track_num_input_tokens(self, inputs: dict) -> None:
        if self.args.include_num_input_tokens_seen != "no":  # none is padding
            self.state.num_input_tokens_seen += self._step_counts["tokens/read"]

    def get_train_dataloader(self) -> DataLoader:
        """Step numbers of one epoch: they count the steps and let a resumed run skip."""
        steps: Any = range(num_steps(len(self._to_train), self.args.pairs_per_step))  # no Dataset
        return DataLoader(steps, batch_size=1, collate_fn=lambda step: {"step": step[0]})

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        return self.args.pairs_per_step

    def num_examples(self, dataloader: DataLoader) -> int:
        return len(self._to_train)

    def floating_point_ops(self, inputs: dict) -> int:
        """Six FLOP a parameter and token read, the usual estimate; the head is counted whole."""
        # of this rank: Trainer adds the ranks up
        tokens = self._step_counts["tokens/read"] // self.args.world_size
        return 6 * tokens * base_of(self.model).num_parameters()

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: "Sequence[TokenPair] | Dataset | dict | None" = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean loss and rewards over all pairs of all ranks, each pair counted once."""
        if eval_dataset is None:
            pairs = self._eval_pairs
        else:
            data = each(tokenised, eval_dataset, self.args, self.processing_class)
            pairs = each(self._prepared, data, self.args)
        if pairs is None:
            raise InputError("evaluation needs eval_dataset")
        metrics: dict[str, float] = {}
        for name, part in (pairs if isinstance(pairs, dict) else {None: pairs}).items():
            prefix = metric_key_prefix if name is None else f"{metric_key_prefix}_{name}"
            self._memory_tracker.start()
            found = self._evaluate_pairs(part, prefix)
            self._memory_tracker.stop_and_update_metrics(found)
            metrics |= found
        return metrics

    def _evaluate_pairs(self, pairs: PreparedPairs, prefix: str) -> dict[str, float]:
        means, model = RunningMeans(), self.model_wrapped
        model.eval()
        self._switch_optimizer("eval")
        plan = self._plan(pairs, len(pairs), shuffle=False)
        with closing(self._batches(pairs, self._parts(plan))) as batches:
            for batch in batches:
                with self._autocast():
                    tokens = model(batch=batch, reads=self._reads)
                self._losses(tokens, batch, means)
        metrics = means.pop(self.accelerator)
        metrics["loss"] *= len(pairs) / self._loss_count(pairs, plan.pairs)
        metrics = {f"{prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def predict(self, *args, **kwargs):
        """Raises InputError: there is nothing to predict but what `evaluate` reports."""
        raise InputError(
            "predict: pairs have no predictions; evaluate(pairs) gives loss and rewards"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            means = self._means.pop(self.accelerator)
            means.pop("loss", None)  # Trainer's own, which weighs uneven steps as training did
            # after the means, which wait for what a GPU has still to do
            logs = {**logs, **means, **self._step_counts, **self._throughput.pop()}
            self.warn_of_shut_masks(means)
        super().log(logs, start_time)
