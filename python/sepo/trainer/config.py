"""SePOConfig: transformers' TrainingArguments and what preference optimisation adds."""

import argparse
import json
import os
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from transformers import TrainingArguments
from transformers.debug_utils import DebugOption
from transformers.hf_argparser import string_to_bool

from sepo.errors import InputError, one_line
from sepo.flags.dtype_note import warn_if_slow
from sepo.flags.options import say_idle
from sepo.flags.packages import check_compiler, check_packages
from sepo.flags.renamed import takes_old_names
from sepo.flags.selection import Select, uses_mass
from sepo.flags.values import check_values, in_yaml
from sepo.trainer.inherited import idle_inherited, refuse_inherited
from sepo_kernels.devices import INTERPRET, fast_dtype

MethodName = Literal[
    "sft", "dpo", "ipo", "dpop", "tdpo1", "tdpo2", "sparsepo", "mapo", "simpo", "rrhf", "sepo",
    "sepo-rand",
]  # fmt: skip
AttnImpl = Literal["auto", "varlen", "flex", "native", "sdpa"]
DTypeName = Literal["float32", "bfloat16"]
Reduce = Literal["mean", "sum"]
Form = Literal["paper", "released"]
MaskKind = Literal["learned", "binary", "random"]
MaskNorm = Literal["minmax", "zscore"]
FusedLayers = Literal["auto", "liger", "compile", "none"]
FirstToken = Literal["paper", "released"]
DEFAULT_BETA = dict.fromkeys(("dpo", "ipo", "tdpo1", "tdpo2", "sparsepo", "mapo"), 0.1)
DEFAULT_BETA |= {"dpop": 0.3, "simpo": 2.0}
CHOICES = {
    "method": MethodName, "dtype": DTypeName, "attn_impl": AttnImpl, "fused_layers": FusedLayers,
    "ipo_reduce": Reduce, "sft_reduce": Reduce, "form": Form, "mask_kind": MaskKind,
    "mask_norm": MaskNorm, "select": Select, "rejected_select": Select, "first_token": FirstToken,
}  # fmt: skip
POSITIVE = (
    "pairs_per_step", "max_tokens_per_batch", "max_length", "head_budget", "lora_r", "lora_alpha",
    "beta", "gamma", "ddp_timeout", "ddp_bucket_cap_mb",
)  # fmt: skip
NOT_NEGATIVE = (
    "dpop_lambda", "tdpo2_alpha", "sft_weight", "mask_l1", "kl_mask_l1", "mask_weight_decay",
    "mask_learning_rate", "learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon",
    "warmup_steps", "eval_delay", "save_total_limit",
)  # fmt: skip
FILES = ("accelerator_config", "fsdp_config", "deepspeed")  # of flags that take a mapping
SEEDS = ("seed", "data_seed")
MOST = 1 << 53
LIGER_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")  # of its own, instead of ours


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
    bf16: str = field(
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
    gamma: float = _help("sepo: scale of the score difference, per nat.", 2.0)
    margin: float = _help("sepo: the paper's lambda; 0.5 for 1B, 0.9 for 7B, 1.3 for 13B.", 0.5)
    beta: float | None = _help(
        "All but sft, rrhf, sepo and sepo-rand: scale of the reward, per nat. Default: simpo 2, "
        "dpop 0.3, others 0.1."
    )
    gamma_beta_ratio: float = _help("simpo: target margin in units of beta.", 0.5)
    label_smoothing: float = _help("dpo: probability that a pair is labelled wrongly.", 0.0)
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
        _check_numbers(self)
        _check_words(self)
        check_compiler(self)
        _translate(self)
        try:
            super().__post_init__()
        except (ValueError, TypeError, KeyError, ImportError, OSError) as error:
            raise InputError(one_line(error)) from error
        _check(self)
        _warn(self)
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
        return f"--eval_strategy {args.eval_strategy.value}"
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
    if args.bf16 == "auto":
        args.bf16 = fast_dtype(accelerator or "cpu") == torch.bfloat16
    try:
        args.bf16 = string_to_bool(str(args.bf16))
    except argparse.ArgumentTypeError:
        raise InputError(f"--bf16: expected true | false | auto, got {args.bf16}") from None
    if args.bf16 and accelerator is None:
        args.use_cpu = True  # transformers wants to be told, though nothing else is there


def _check(args: SePOConfig) -> None:
    for name, kind in CHOICES.items():
        value = getattr(args, name)
        if value not in get_args(kind) and (value is not None or name != "rejected_select"):
            raise InputError(
                f"--{name}: expected {' | '.join(get_args(kind))}, got {in_yaml(value)}"
            )
    _check_selection(args)
    if args.mask_kind == "random" and args.independent_masks:
        raise InputError(
            "--mask_kind random draws one mask: expected --independent_masks false, got true"
        )
    for other in ("gradient_checkpointing", "torch_compile"):
        # compiled parts hide their GEMMs from whoever would save their outputs
        if args.selective_checkpointing and getattr(args, other):
            raise InputError(f"--selective_checkpointing: expected without --{other}, got both")
    for flag in ("load_in_4bit", "load_in_8bit"):
        if getattr(args, flag) and not args.use_peft:
            raise InputError(
                f"--{flag}: expected --use_peft too, quantised weights can't be trained"
            )
        if getattr(args, flag) and not _has_gpu(args):
            # bitsandbytes repacks weights for a CPU at the first pass without a gradient (the
            # comparison of a model with itself, an evaluation) and has no gradient from then on
            raise InputError(f"--{flag}: bitsandbytes trains on a GPU, got a CPU")
    if args.fp16 and not _has_gpu(args):
        raise InputError("--fp16: float16 is computed with on a GPU, got a CPU; see --bf16")
    if args.load_in_4bit and args.load_in_8bit:
        raise InputError("expected --load_in_4bit or --load_in_8bit, got both")
    _check_fused(args)
    check_packages(args)
    if args.n_gpu > 1:
        raise InputError(
            f"{args.n_gpu} GPUs in one process: start with "
            f"torchrun --nproc-per-node {args.n_gpu} -m sepo.train"
        )


def _check_fused(args: SePOConfig) -> None:
    """--fused_layers beside transformers' own flags for the same: one of them decides."""
    wish, liger = args.fused_layers, "--fused_layers liger"
    for flag, given, agrees in (
        ("--use_liger_kernel", args.use_liger_kernel, ("auto", "liger")),
        ("--torch_compile", args.torch_compile, ("auto", "compile")),
        ("--selective_checkpointing", args.selective_checkpointing, ("auto", "liger", "none")),
    ):
        if given and wish not in agrees:
            expected = " or ".join(agrees)
            raise InputError(f"{flag}: expected --fused_layers {expected} beside it, got {wish}")
    if args.use_liger_kernel:
        if args.torch_compile:
            raise InputError("--use_liger_kernel: expected without --torch_compile, got both")
        # Trainer would let Liger change classes, for every model to come
        args.fused_layers, args.use_liger_kernel, liger = "liger", False, "--use_liger_kernel"
    if args.fused_layers == "liger" and not (_has_gpu(args) or INTERPRET):
        raise InputError(f"{liger}: its kernels need a GPU, got a CPU")
    for loss in LIGER_LOSSES:
        if (args.liger_kernel_config or {}).get(loss):
            raise InputError(
                f"--liger_kernel_config {loss}: expected false, got true: "
                "the loss needs the head at the selected rows only"
            )


def _check_numbers(args: SePOConfig) -> None:
    for names, words, holds in (
        (POSITIVE, "a positive number", lambda value: value > 0),
        (NOT_NEGATIVE, "at least 0", lambda value: value >= 0),
        (SEEDS, "a whole number from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32),
        (
            ("lora_dropout", "adam_beta1", "adam_beta2"),
            "a number in [0, 1)",
            lambda value: 0 <= value < 1,
        ),
        (("label_smoothing",), "a number in [0, 0.5)", lambda value: 0 <= value < 0.5),
        (("max_steps",), "a positive number, or -1 for --num_train_epochs", lambda n: n >= -1),
    ):
        for name in names:
            if (value := getattr(args, name)) is not None and not holds(value):
                raise InputError(f"--{name}: expected {words}, got {value}")
    for name, value in vars(args).items():  # of a count; beyond these torch and floats have none
        is_count = type(value) is int or name == "num_train_epochs"
        if is_count and not -MOST < value < MOST:
            raise InputError(f"--{name}: expected a number below 2**53, got {value}")
    if args.max_steps <= 0 and not args.num_train_epochs > 0:
        got = args.num_train_epochs
        raise InputError(f"--num_train_epochs: expected a positive number, got {got}")
    for what in ("logging", "save", "eval"):
        steps = getattr(args, f"{what}_steps")
        if getattr(args, f"{what}_strategy") == "steps" and steps is not None and not steps > 0:
            raise InputError(f"--{what}_steps: expected a positive number, got {steps}")


def _check_words(args: SePOConfig) -> None:
    """Of the fields that take a word or something else, which `check_values` leaves alone."""
    debug = args.debug.split() if isinstance(args.debug, str) else args.debug or []
    seen = [args.include_num_input_tokens_seen]
    for name, words, known in (
        ("debug", debug, [option.value for option in DebugOption]),
        ("include_num_input_tokens_seen", seen, ["all", "non_padding", "no", True, False]),
    ):
        for word in words:
            if word not in known:
                expected = " | ".join(map(in_yaml, known))
                raise InputError(f"--{name}: expected {expected}, got {in_yaml(word)}")
    for name in args._VALID_DICT_FIELDS:
        value = getattr(args, name, None)
        if not isinstance(value, str) or (name in FILES and os.path.isfile(value)):
            continue
        try:
            is_mapping = isinstance(json.loads(value), dict)
        except ValueError:
            is_mapping = False
        if not is_mapping:
            or_file = ", or a file of one" if name in FILES else ""
            raise InputError(f"--{name}: expected a JSON object{or_file}, got {value}")


def _warn(args: SePOConfig) -> None:
    if not args.should_log:  # once, not once a rank
        return
    say_idle(idle_inherited(args))
    if args.bf16:
        warn_if_slow("--bf16", args.device, "leave it out, or say --bf16 auto")
    elif args.dtype == "bfloat16":
        warn_if_slow("--dtype bfloat16", args.device)


def _check_selection(args: SePOConfig) -> None:
    if args.method == "sepo-rand" and uses_mass(args):
        name = "select" if args.select == "mass" else "rejected_select"
        raise InputError(
            f"--{name}: expected fraction for sepo-rand, which draws without scores, got mass"
        )
    for name in ("fraction", "rejected_fraction", "mass"):
        value = getattr(args, name)
        if value is not None and not 0 < value <= 1:
            raise InputError(f"--{name}: expected a number in (0, 1], got {value}")


def _has_gpu(args: SePOConfig) -> bool:
    return args.device.type != "cpu"
