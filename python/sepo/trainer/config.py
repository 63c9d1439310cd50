"""SePOConfig: transformers' TrainingArguments and what preference optimisation adds."""

import argparse
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from transformers import TrainingArguments
from transformers.hf_argparser import string_to_bool

from sepo.data.selection import FirstToken
from sepo.errors import InputError, one_line
from sepo.flags.packages import check_compiler, word
from sepo.flags.renamed import takes_old_names
from sepo.flags.selection import Select
from sepo.flags.values import check_values
from sepo.trainer.checks import check_numbers, check_together, check_words, warn
from sepo.trainer.inherited import refuse_inherited
from sepo_kernels.devices import fast_dtype

MethodName = Literal[
    "sft", "dpo", "ipo", "dpop", "tdpo1", "tdpo2", "sparsepo", "mapo", "simpo", "rrhf", "sepo",
    "sepo-rand", "sepo-entropy", "confpo", "selective-dpo",
]  # fmt: skip
AttnImpl = Literal["auto", "varlen", "flex", "native", "sdpa"]
DTypeName = Literal["float32", "bfloat16"]
Reduce = Literal["mean", "sum"]
Form = Literal["paper", "released"]
MaskKind = Literal["learned", "binary", "random"]
MaskNorm = Literal["minmax", "zscore"]
FusedLayers = Literal["auto", "liger", "compile", "none"]
DEFAULT_BETA = dict.fromkeys(
    ("dpo", "ipo", "tdpo1", "tdpo2", "sparsepo", "mapo", "selective-dpo"), 0.1
)
DEFAULT_BETA |= {"dpop": 0.3, "simpo": 2.0, "confpo": 2.0}
CHOICES = {
    "method": MethodName, "dtype": DTypeName, "attn_impl": AttnImpl, "fused_layers": FusedLayers,
    "ipo_reduce": Reduce, "sft_reduce": Reduce, "form": Form, "mask_kind": MaskKind,
    "mask_norm": MaskNorm, "select": Select, "rejected_select": Select, "first_token": FirstToken,
}  # fmt: skip


def _help(text: str, default=None):
    return field(default=default, metadata={"help": text})


@takes_old_names
@dataclass
class SePOConfig(TrainingArguments):
    """Arguments of SePOTrainer and of `sepo train`. Defaults are the SePO paper's.

    Old names of arguments are taken too, and said: `sepo.flags.renamed` lists them. Raises
    InputError, naming the flag, for values that can't be trained with.
    """

    method: MethodName = _help("What to train.", "sepo")
    model_name_or_path: str | None = _help("Hub id or local directory of the policy.")
    reference: str | None = _help(
        "Hub id or local directory of the reference, for the methods that have one, if the data "
        "keeps nothing of it. Default: the policy as it was before training."
    )
    dataset_name: str | None = _help(
        "A scored store written by `sepo score`, or preference data: hub id, or a local "
        "json, jsonl, csv or parquet file."
    )
    dataset_config: str | None = _help("Configuration of a hub data set.")
    dataset_split: str = _help("Split of a hub data set.", "train")
    eval_dataset_name: str | None = _help("Data to evaluate on, of the same kinds.")
    eval_dataset_split: str | None = _help("Its split. Default: test, or all of a single file.")
    max_length: int | None = _help(
        "Tokens of prompt and response together; longer responses are cut, and counted.", 1024
    )
    strict: bool = _help(
        "Drop every row that would be kept with a note: what the chat template leaves out or "
        "changes, what inference would render otherwise, what is cut.",
        False,
    )
    append_eos: bool = _help("End plain-text responses with the tokenizer's end token.", True)
    trust_remote_code: bool = _help("Run model code that comes with a checkpoint.", False)
    dtype: DTypeName = _help(
        "Of the weights. With float32, --bf16 computes in bfloat16 and keeps the weights exact. "
        "bfloat16 weights take half the memory, but lose updates below 1/256 of a weight: for "
        "frozen weights under LoRA.",
        "float32",
    )
    # str: HfArgumentParser would make `bool | str` a bool; a bool it is after __post_init__
    bf16: str = field(  # type: ignore[assignment]
        default=False,
        metadata={
            "nargs": "?",
            "const": True,
            "help": "Compute in bfloat16; the weights keep their dtype. auto: where the machine "
            "multiplies it at least as fast as float32.",
        },
    )
    attn_impl: AttnImpl = _help("Attention for packed pairs; auto: the first that can run.", "auto")

    select: Select = _help(
        "sepo: how many of a response's tokens the loss uses: a fraction of them, or the fewest "
        "that hold a share of its scores, see --mass.",
        "fraction",
    )
    rejected_select: Select | None = _help(
        "sepo: the same for rejected responses. Default: fraction with --rejected_fraction, else "
        "as --select."
    )
    fraction: float = _help("sepo: that share of a response's tokens.", 0.3)
    rejected_fraction: float | None = _help("sepo: the same for rejected responses, if different.")
    mass: float = _help(
        "sepo, with --select mass: use the fewest tokens that hold this share of a chosen "
        "response's positive scores, of a rejected one's negative scores.",
        0.8,
    )
    first_token: FirstToken = _help(
        "sepo: released selects as the released code does, which can't select the first token of "
        "a response and counts without it.",
        "paper",
    )
    selection_quantile: float = _help(
        "selective-dpo: at each step a response's loss uses the tokens from this quantile up of the "
        "reference's log-probability minus the policy's (rejected: the reverse).",
        0.6,
    )
    gamma: float = _help("sepo: scale of the score difference, per nat.", 2.0)
    margin: float = _help("sepo: the paper's lambda; 0.5 for 1B, 0.9 for 7B, 1.3 for 13B.", 0.5)
    beta: float | None = _help(
        "All but sft, rrhf and sepo's: scale of the reward, per nat. Default: simpo and "
        "confpo 2, dpop 0.3, others 0.1."
    )
    gamma_beta_ratio: float = _help("simpo, confpo: target margin in units of beta.", 0.5)
    label_smoothing: float = _help(
        "dpo, selective-dpo: probability that a pair is labelled wrongly.", 0.0
    )
    ipo_reduce: Reduce = _help("ipo: a response counts by its mean or sum over tokens.", "mean")
    dpop_lambda: float = _help("dpop: weight of a chosen response below its reference.", 50.0)
    tdpo2_alpha: float = _help("tdpo2: weight of the KL divergence.", 0.5)
    sft_weight: float = _help("rrhf: weight of the chosen response's own loss.", 1.0)
    sft_reduce: Reduce = _help("rrhf: that loss is a sum (the paper) or mean over tokens.", "sum")

    form: Form = _help(
        "sparsepo, mapo: eq. 6-8 of the paper, or the loss of the released code.", "released"
    )
    mask_kind: MaskKind = _help(
        "sparsepo: what the masks are; binary and random are ablations.", "learned"
    )
    independent_masks: bool = _help("sparsepo: one mask for rewards and one for the KL.", False)
    mask_layernorm: bool = _help("sparsepo: normalise the reference's states first.", True)
    mask_learning_rate: float | None = _help("sparsepo: of the mask; default: --learning_rate.")
    mask_weight_decay: float = _help("sparsepo: of the mask's weights, not its biases.", 0.01)
    mask_l1: float = _help("sparsepo: weight of the reward mask's L1 norm in the loss.", 0.001)
    kl_mask_l1: float | None = _help("sparsepo: of the KL mask's; default: --mask_l1.")
    mask_norm: MaskNorm = _help("mapo: how activations become weights, a response each.", "minmax")

    pairs_per_step: int = _help("Pairs of one optimiser step, over all ranks.", 128)
    max_tokens_per_batch: int | None = _help(
        "Token budget of one micro-batch, at least the longest pair. Changes speed and memory, "
        "never the gradient. Default: what a GPU's memory holds, up to 65536; 8192 elsewhere."
    )
    head_budget: int | None = _help(
        "Bytes for logits or probabilities at once. Default: 1 GiB on a CPU; on a GPU what saving "
        "them takes, at most an eighth of its memory."
    )
    selective_checkpointing: bool = _help(
        "Save the outputs of GEMMs and attention, and recompute the rest of a layer in backward: "
        "about half the memory, nearly the same time. --gradient_checkpointing recomputes all.",
        False,
    )
    fused_layers: FusedLayers = _help(
        "Norms, activations and rotations of a layer in few kernels: liger (its kernels for layers, "
        "never its losses), compile (each part of a layer compiled) or none. auto: on a GPU liger "
        "where it is installed and knows the architecture, else compile; none on a CPU.",
        "auto",
    )
    disable_dropout: bool = _help("Train without the model's own dropout.", True)

    use_peft: bool = _help("Train LoRA adapters, the model itself frozen. Needs peft.", False)
    lora_r: int = _help("Rank of an adapter.", 16)
    lora_alpha: int = _help("Scale of an adapter, in units of 1 / rank.", 32)
    lora_dropout: float = _help("Dropout before an adapter; above 0 it depends on the budget.", 0.0)
    lora_target_modules: list[str] | None = _help(
        "Names (or ends of names) of the modules that get an adapter, or all-linear. Default: "
        "peft's for the architecture. Never the language-model head."
    )
    lora_modules_to_save: list[str] | None = _help("Modules to train whole, beside the adapters.")
    load_in_4bit: bool = _help("Quantise the frozen model (nf4): QLoRA. Needs bitsandbytes.", False)
    load_in_8bit: bool = _help("The same with 8 bits, activations too.", False)

    learning_rate: float = _help("Peak learning rate.", 5e-7)
    num_train_epochs: float = _help("Passes over the pairs.", 1.0)
    lr_scheduler_type: str = _help("Shape of the learning rate.", "cosine")
    warmup_steps: float = _help("Steps of warm-up, or below 1 a share of all steps.", 0.05)
    logging_steps: float = _help("Steps between two lines of the log.", 1)

    def __post_init__(self):
        check_values(self)
        refuse_inherited(self)  # before anything is derived from what was given
        check_numbers(self)
        check_words(self)
        check_compiler(self)
        _translate(self)
        try:
            super().__post_init__()
        except (ValueError, TypeError, KeyError, ImportError, OSError) as error:
            raise InputError(one_line(error)) from error
        check_together(self, CHOICES)
        warn(self)
        # a checkpoint every so many steps; the plan, not a sampler, decides the order of the data
        self.remove_unused_columns = False
        if self.ddp_find_unused_parameters is None:  # else DDP walks the graph at every step
            self.ddp_find_unused_parameters = False
        if self.beta is None:
            self.beta = DEFAULT_BETA.get(self.method)
        if self.kl_mask_l1 is None:
            self.kl_mask_l1 = self.mask_l1

    @property
    def device(self) -> torch.device:
        """TrainingArguments', but cpu where Accelerate says cpu:0, to which torch.load can't restore."""
        device = super().device  # transformers 5.17 loads an optimiser's state there
        return torch.device("cpu") if device.type == "cpu" else device

    def to_dict(self) -> dict:
        # TrainingArguments takes every name that ends in _token for a secret
        return super().to_dict() | {"first_token": self.first_token}


def data_to_evaluate_on(args: SePOConfig) -> str | None:
    """The flag that needs it, if one does."""
    if args.eval_strategy != "no":
        return f"--eval_strategy {word(args.eval_strategy)}"
    return "--eval_on_start" if args.eval_on_start else None


def _translate(args: SePOConfig) -> None:
    """Users' usual flags into what this version of transformers expects of them."""
    if hasattr(args, "activation_checkpointing"):  # the new name; the old one alone is a warning
        for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
            new = old.replace("gradient", "activation")
            if not getattr(args, new):
                setattr(args, new, getattr(args, old))
            setattr(args, old, None)
    resume = {"true": "true", "false": None}  # a YAML's or a program's own, and the words
    asked = args.resume_from_checkpoint
    args.resume_from_checkpoint = resume.get(str(asked).lower(), asked)
    accelerator = None if args.use_cpu else torch.accelerator.current_accelerator(True)
    wish, flags = str(args.bf16), cast(TrainingArguments, args)  # in whose type bf16 is a bool
    if wish == "auto":
        wish = str(fast_dtype(accelerator or "cpu") == torch.bfloat16)
    try:
        flags.bf16 = string_to_bool(wish)
    except argparse.ArgumentTypeError:
        raise InputError(f"--bf16: expected true | false | auto, got {args.bf16}") from None
    if args.bf16 and accelerator is None:
        args.use_cpu = True  # transformers wants to be told, though nothing else is there
