"""In which order `sepo train --help` shows the flags: this project's in groups, then the others."""

from dataclasses import MISSING, Field, field, fields, make_dataclass
from typing import get_type_hints

from sepo.trainer.config import SePOConfig

GROUPS = {  # title -> fields of SePOConfig; a test says which are in none
    "what every run says": ("method", "model_name_or_path", "dataset_name", "output_dir"),
    "data and model": (
        "dataset_config", "dataset_split", "eval_dataset_name", "eval_dataset_split", "max_length",
        "append_eos", "strict", "trust_remote_code", "dtype", "bf16", "attn_impl", "fused_layers",
        "disable_dropout",
    ),
    "loss of the method": (
        "beta", "gamma", "margin", "gamma_beta_ratio", "label_smoothing", "ipo_reduce",
        "dpop_lambda", "tdpo2_alpha", "sft_weight", "sft_reduce", "form",
    ),
    "selection of tokens": (
        "select", "rejected_select", "fraction", "rejected_fraction", "mass", "first_token",
        "selection_quantile",
    ),
    "reference": ("reference",),
    "mask of sparsepo and mapo": (
        "mask_kind", "independent_masks", "mask_layernorm", "mask_learning_rate",
        "mask_weight_decay", "mask_l1", "kl_mask_l1", "mask_norm",
    ),
    "steps and memory": (
        "pairs_per_step", "num_train_epochs", "learning_rate", "lr_scheduler_type", "warmup_steps",
        "max_tokens_per_batch", "head_budget", "selective_checkpointing",
    ),
    "adapters": (
        "use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules",
        "lora_modules_to_save", "load_in_4bit", "load_in_8bit",
    ),
    "log and resume": ("logging_steps", "resume_from_checkpoint"),
}  # fmt: skip
REST = "transformers' TrainingArguments"
HELP = {  # of transformers' fields that mean less, or more, here
    "output_dir": "Folder of the model, its checkpoints and the log.",
    "resume_from_checkpoint": "Folder of the checkpoint to go on from; true: the last one.",
}


def groups() -> list[type]:
    """Make a dataclass a group, as HfArgumentParser wants them; transformers' own come last."""
    named = {name for names in GROUPS.values() for name in names}
    rest = [f.name for f in fields(SePOConfig) if f.init and f.name not in named]
    hints = get_type_hints(SePOConfig)
    return [
        make_dataclass(
            "Group",
            [(name, hints[name], _copy(name)) for name in names],
            namespace={"_argument_group_name": title},
        )
        for title, names in {**GROUPS, REST: rest}.items()
    ]


def _copy(name: str) -> Field:
    """A field of SePOConfig, which a second dataclass would change."""
    of = SePOConfig.__dataclass_fields__[name]
    default = {"default": of.default} if of.default is not MISSING else {}
    if of.default_factory is not MISSING:
        default = {"default_factory": of.default_factory}
    help_here = {"help": HELP[name]} if name in HELP else {}
    return field(**default, metadata={**of.metadata, **help_here})
