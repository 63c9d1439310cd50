"""Serve or refuse each of transformers' TrainingArguments: one table, complete by test.

A field is served as transformers documents it, refused by name with the reason, served where what
it needs is there, or decided here whatever is given.
"""

from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from sepo.errors import InputError


class Served:
    """As transformers documents it."""


@dataclass(frozen=True)
class Refused:
    """Any value but the default, or one of `values`, has no meaning here."""

    why: str  # follows "--name has no meaning here: "
    values: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Needs:
    """Served, but nothing reads it unless `met`: then it does nothing, which is said."""

    what: str  # follows "--name does nothing without "
    met: Callable[[Any], Any]  # of a SePOConfig, whose file imports this one


@dataclass(frozen=True)
class Decided:
    """Both values are taken, and it is as `how` says."""

    how: str


_SERVED = Served()
_BATCH = Refused(
    "a step is --pairs_per_step pairs, split into micro-batches of at most "
    "--max_tokens_per_batch tokens"
)
_ORDER = Refused("which pairs a step has follows from --data_seed and the step's number alone")
_LOADER = Refused("the loader hands out step numbers; pairs are read where they lie")
_PREDICTIONS = Refused("an evaluation is means over all pairs and makes no predictions")
_FULL_EVAL = Refused("an evaluation computes as training does, see --bf16")
_HUB = Needs("--push_to_hub", lambda a: a.push_to_hub)
_TRACKIO = Needs("--report_to trackio", lambda a: "trackio" in (a.report_to or ()))
_TRACKER = Needs("--report_to", lambda a: a.report_to)
_EVALUATION = Needs("--eval_strategy", lambda a: a.eval_strategy != "no")
_BEST = Needs(
    "--load_best_model_at_end, --save_strategy best or an --lr_scheduler_type that follows it",
    lambda a: (
        a.load_best_model_at_end
        or a.save_strategy == "best"
        or a.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
    ),
)
_ADAM = Needs(
    "an --optim that has moments of gradients",
    lambda a: a.optim not in ("sgd", "adagrad", "rmsprop", "adafactor"),
)
_COMPILED = Needs("--torch_compile", lambda a: a.torch_compile)
_CHECKPOINTING = Needs("--gradient_checkpointing", lambda a: a.gradient_checkpointing)
_LOGS = Needs("--logging_strategy steps", lambda a: a.logging_strategy == "steps")

FIELDS = {
    "output_dir": _SERVED,
    # how long
    "per_device_train_batch_size": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "auto_find_batch_size": _BATCH,
    "num_train_epochs": _SERVED,
    "max_steps": _SERVED,
    # learning rate and optimiser
    "learning_rate": _SERVED,
    "lr_scheduler_type": _SERVED,
    "lr_scheduler_kwargs": _SERVED,
    "warmup_steps": _SERVED,
    "optim": Refused(
        "it steps in backward, and a step's micro-batches have one each",
        (
            *("lomo", "adalomo", "apollo_adamw_layerwise", "galore_adamw_layerwise"),
            *("galore_adamw_8bit_layerwise", "galore_adafactor_layerwise"),
        ),
    ),
    "optim_args": Needs(
        "an --optim that takes them, as sgd does",
        lambda a: a.optim not in ("adamw_torch", "adamw_torch_fused", "adafactor"),
    ),
    "optim_target_modules": Needs(
        "--optim galore or apollo", lambda a: a.optim.startswith(("galore", "apollo"))
    ),
    "weight_decay": _SERVED,
    "adam_beta1": _ADAM,
    "adam_beta2": _ADAM,
    "adam_epsilon": _ADAM,
    "max_grad_norm": _SERVED,
    # loss
    "average_tokens_across_devices": Refused("a loss is over the pairs of all ranks"),
    "label_smoothing_factor": Refused(
        "no labels are smoothed; dpo's probability of a wrongly labelled pair is --label_smoothing"
    ),
    "neftune_noise_alpha": Refused(
        "its noise is scaled by a sequence's length, and a prompt that is read once belongs to "
        "two of different lengths, cut after their last selected tokens"
    ),
    # precision
    "bf16": _SERVED,
    "fp16": _SERVED,
    "bf16_full_eval": _FULL_EVAL,
    "fp16_full_eval": _FULL_EVAL,
    "tf32": _SERVED,
    # memory and speed
    "activation_checkpointing": _SERVED,
    "activation_checkpointing_kwargs": _CHECKPOINTING,
    "gradient_checkpointing": _SERVED,
    "gradient_checkpointing_kwargs": _SERVED,  # another name of the same
    "torch_compile": _SERVED,
    "torch_compile_backend": _COMPILED,
    "torch_compile_mode": _COMPILED,
    "use_liger_kernel": _SERVED,  # another name of --fused_layers liger
    "liger_kernel_config": Needs("--fused_layers liger", lambda a: a.fused_layers == "liger"),
    "use_cache": Refused("packed pairs are read without a cache"),
    "torch_empty_cache_steps": _SERVED,
    # log
    "logging_strategy": _SERVED,
    "logging_steps": _LOGS,
    "logging_first_step": _SERVED,
    "log_on_each_node": _SERVED,
    "logging_nan_inf_filter": Decided("a loss that is not finite ends the run"),
    "include_num_input_tokens_seen": _SERVED,
    "log_level": _SERVED,
    "log_level_replica": _SERVED,
    "disable_tqdm": _SERVED,
    "report_to": _SERVED,
    "run_name": _TRACKER,
    "project": _TRACKIO,
    "trackio_space_id": _TRACKIO,
    "trackio_bucket_id": _TRACKIO,
    "trackio_static_space_id": _TRACKIO,
    # evaluation
    "eval_strategy": _SERVED,
    "eval_steps": Needs("--eval_strategy steps", lambda a: a.eval_strategy == "steps"),
    "eval_delay": _EVALUATION,
    "eval_on_start": _SERVED,
    "do_eval": _EVALUATION,
    "per_device_eval_batch_size": Refused("an evaluation is split by --max_tokens_per_batch"),
    "prediction_loss_only": _PREDICTIONS,
    "eval_do_concat_batches": _PREDICTIONS,
    "eval_use_gather_object": _PREDICTIONS,
    "eval_accumulation_steps": _PREDICTIONS,
    "include_for_metrics": _PREDICTIONS,
    "batch_eval_metrics": _PREDICTIONS,
    "do_predict": _PREDICTIONS,
    # checkpoints
    "save_strategy": _SERVED,
    "save_steps": Needs("--save_strategy steps", lambda a: a.save_strategy == "steps"),
    "save_total_limit": _SERVED,
    "save_only_model": _SERVED,
    "save_on_each_node": _SERVED,
    "enable_jit_checkpoint": Refused(
        "it saves between a step's gradient and its update, which can't be continued bit by bit; "
        "a killed run goes on at its last checkpoint, see --save_steps"
    ),
    "load_best_model_at_end": _SERVED,
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "resume_from_checkpoint": _SERVED,
    "ignore_data_skip": _ORDER,
    "restore_callback_states_from_checkpoint": _SERVED,
    # hub
    "push_to_hub": _SERVED,
    "hub_strategy": Refused(
        "it uploads a checkpoint before the mark that makes it whole",
        ("checkpoint", "all_checkpoints"),
    ),
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    # chance
    "full_determinism": _SERVED,
    "seed": _SERVED,
    "data_seed": _SERVED,
    # machine
    "use_cpu": _SERVED,
    "accelerator_config": Refused(
        "it tells how to divide batches of rows, and ranks divide a step's pairs by --data_seed"
    ),
    "parallelism_config": Refused("ranks share a step's pairs, and no pair is split over ranks"),
    "ddp_find_unused_parameters": _SERVED,
    "ddp_bucket_cap_mb": _SERVED,
    "ddp_broadcast_buffers": _SERVED,
    "ddp_static_graph": _SERVED,
    "ddp_backend": _SERVED,
    "ddp_timeout": _SERVED,
    "fsdp": _SERVED,
    "fsdp_config": Needs("--fsdp", lambda a: a.fsdp),
    "deepspeed": _SERVED,
    "debug": _SERVED,
    "skip_memory_metrics": _SERVED,
    # data
    "dataloader_drop_last": Refused("an epoch trains every pair, its last step may have fewer"),
    "dataloader_num_workers": _LOADER,
    "dataloader_persistent_workers": _LOADER,
    "dataloader_prefetch_factor": _LOADER,
    "dataloader_multiprocessing_context": _LOADER,
    "dataloader_in_order": _LOADER,
    "dataloader_pin_memory": Decided("no tensor comes from the loader, and none is pinned"),
    "label_names": Refused("there are no labels: the packer says which row predicts which token"),
    "train_sampling_strategy": _ORDER,
    "length_column_name": _ORDER,
    "remove_unused_columns": Decided("a format's columns are read, the others left alone"),
    # of scripts, which transformers does not read
    "do_train": Decided("this script trains"),
    "local_rank": Decided("torchrun's variable LOCAL_RANK counts"),
}


def refuse_inherited(args: TrainingArguments) -> None:
    """Raises InputError for a flag that can't do here what it does in transformers.

    To be called before TrainingArguments derives values of its own from what was given.
    """
    for name, given, default in _given(args):
        verdict = FIELDS.get(name)
        if isinstance(verdict, Refused) and (verdict.values is None or given in verdict.values):
            got = "" if isinstance(given, dict) else f": expected {default}, got {given}"
            raise InputError(f"--{name} has no meaning here{got}: {verdict.why}")


def idle_inherited(args: TrainingArguments) -> list[str]:
    """Of the flags that were given, in words: which do nothing, and what they lack."""
    return [
        f"--{name} does nothing without {verdict.what}"
        for name, _, _ in _given(args)
        if isinstance(verdict := FIELDS.get(name), Needs) and not verdict.met(args)
    ]


def given_of(args: TrainingArguments, *names: str) -> list[str]:
    """Which of the fields are not as their defaults."""
    return [name for name in names if getattr(args, name) != _default(args, name)]


def _given(args: TrainingArguments) -> Iterator[tuple[str, Any, Any]]:
    """(name, value, default) of every inherited field that isn't as its default."""
    names = [field.name for field in fields(TrainingArguments) if field.init]
    for name in given_of(args, *names):
        given = getattr(args, name)
        if name != "accelerator_config" or not _asks_for_nothing(given):
            yield name, given, _default(args, name)


def _default(args: TrainingArguments, name: str) -> Any:
    field = args.__dataclass_fields__[name]  # this project's, not always transformers'
    return field.default if field.default_factory is MISSING else field.default_factory()


def _asks_for_nothing(config: AcceleratorConfig | dict | str | None) -> bool:
    """Whether it is what TrainingArguments makes of None, or a copy of that."""
    values = vars(config) if isinstance(config, AcceleratorConfig) else config
    usual = vars(AcceleratorConfig())
    return isinstance(values, dict) and all(usual.get(k, k) == v for k, v in values.items())
