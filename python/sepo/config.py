"""SePOConfig: transformers' TrainingArguments and what preference optimisation adds."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from transformers import TrainingArguments

from sepo.errors import InputError

MethodName = Literal["sft", "dpo", "simpo", "sepo", "sepo-rand"]
AttnImpl = Literal["auto", "varlen", "flex", "native", "sdpa"]
DTypeName = Literal["float32", "bfloat16"]
DEFAULT_BETA = {"dpo": 0.1, "simpo": 2.0}
LIGER_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")  # of its own, instead of ours


def _help(text: str, default=None):
    return field(default=default, metadata={"help": text})


@dataclass
class SePOConfig(TrainingArguments):
    """Arguments of SePOTrainer and of `sepo train`. Defaults are the SePO paper's.

    Raises InputError, naming the flag, for values that can't be trained with.
    """

    method: MethodName = _help("What to train.", "sepo")
    model_name_or_path: str | None = _help("Hub id or local directory of the policy.")
    reference_model_name_or_path: str | None = _help(
        "dpo: the reference, if the data has no cached reference log-probabilities. "
        "Default: the policy as it was before training."
    )
    dataset_name: str | None = _help(
        "A scored store written by `sepo score`, or preference data: hub id, or a local "
        "json, jsonl, csv or parquet file."
    )
    dataset_config: str | None = _help("Configuration of a hub data set.")
    dataset_split: str = _help("Split of a hub data set.", "train")
    eval_dataset_name: str | None = _help("Data to evaluate on, of the same kinds.")
    eval_dataset_split: str = _help("Its split.", "test")
    max_length: int | None = _help(
        "Tokens of prompt and response together; longer responses are cut, and counted.", 1024
    )
    append_eos: bool = _help("End plain-text responses with the tokenizer's end token.", True)
    trust_remote_code: bool = _help("Run model code that comes with a checkpoint.", False)
    dtype: DTypeName = _help(
        "Of the weights. With float32, --bf16 computes in bfloat16 and keeps the weights exact. "
        "bfloat16 weights take half the memory, but lose updates below 1/256 of a weight: for "
        "frozen weights under LoRA.",
        "float32",
    )
    attn_impl: AttnImpl = _help("Attention for packed pairs; auto: the first that can run.", "auto")

    fraction: float = _help("sepo: share of a response's tokens that the loss uses.", 0.3)
    rejected_fraction: float | None = _help("sepo: the same for rejected responses, if different.")
    gamma: float = _help("sepo: scale of the score difference, per nat.", 2.0)
    margin: float = _help("sepo: the paper's lambda; 0.5 for 1B, 0.9 for 7B, 1.3 for 13B.", 0.5)
    beta: float | None = _help("dpo (default 0.1) and simpo (2): scale of the reward, per nat.")
    gamma_beta_ratio: float = _help("simpo: target margin in units of beta.", 0.5)
    label_smoothing: float = _help("dpo: probability that a pair is labelled wrongly.", 0.0)

    pairs_per_step: int = _help("Pairs of one optimiser step, over all ranks.", 128)
    max_tokens_per_batch: int | None = _help(
        "Token budget of one micro-batch, at least the longest pair. Changes speed and memory, "
        "never the gradient.",
        8192,
    )
    head_budget: int | None = _help("Bytes for logits or probabilities at once.")
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
        _translate(self)
        super().__post_init__()
        _check(self)
        # a checkpoint every so many steps; the plan, not a sampler, decides the order of the data
        self.remove_unused_columns = False
        if self.ddp_find_unused_parameters is None:  # else DDP walks the graph at every step
            self.ddp_find_unused_parameters = False
        if self.beta is None:
            self.beta = DEFAULT_BETA.get(self.method)


def _translate(args: SePOConfig) -> None:
    """Users' usual flags into what this version of transformers expects of them."""
    if args.gradient_checkpointing and hasattr(args, "activation_checkpointing"):
        args.activation_checkpointing = True  # the new name; the old one alone is a warning
    if args.use_liger_kernel:
        asked = dict(args.liger_kernel_config or {})
        for loss in LIGER_LOSSES:
            if asked.get(loss):
                raise InputError(
                    f"--liger_kernel_config {loss}: expected false, got true: "
                    "the loss needs the head at the selected rows only"
                )
        args.liger_kernel_config = asked | dict.fromkeys(LIGER_LOSSES, False)


def _check(args: SePOConfig) -> None:
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) != type(args).__dataclass_fields__[name].default:
            raise InputError(
                f"--{name} has no meaning here: a step is --pairs_per_step pairs, split into "
                "micro-batches of at most --max_tokens_per_batch tokens"
            )
    for name, kind in (("method", MethodName), ("dtype", DTypeName), ("attn_impl", AttnImpl)):
        if (value := getattr(args, name)) not in get_args(kind):
            raise InputError(f"--{name}: expected {' | '.join(get_args(kind))}, got {value}")
    for name in ("fraction", "rejected_fraction"):
        value = getattr(args, name)
        if value is not None and not 0 < value <= 1:
            raise InputError(f"--{name}: expected a number in (0, 1], got {value}")
    for name in ("pairs_per_step", "max_tokens_per_batch", "max_length", "head_budget", "lora_r"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name}: expected a positive number, got {value}")
    if not 0 <= args.label_smoothing < 0.5:
        raise InputError(
            f"--label_smoothing: expected a number in [0, 0.5), got {args.label_smoothing}"
        )
    for flag in ("load_in_4bit", "load_in_8bit"):
        if getattr(args, flag) and not args.use_peft:
            raise InputError(
                f"--{flag}: expected --use_peft too, quantised weights can't be trained"
            )
        if getattr(args, flag) and not _has_gpu(args):
            # bitsandbytes repacks weights for a CPU at the first pass without a gradient (the
            # comparison of a model with itself, an evaluation) and has no gradient from then on
            raise InputError(f"--{flag}: bitsandbytes trains on a GPU, got a CPU")
    if args.load_in_4bit and args.load_in_8bit:
        raise InputError("expected --load_in_4bit or --load_in_8bit, got both")
    if args.use_liger_kernel and not _has_gpu(args):
        raise InputError("--use_liger_kernel: its kernels need a GPU, got a CPU")
    if args.n_gpu > 1:
        raise InputError(
            f"{args.n_gpu} GPUs in one process: start with "
            f"torchrun --nproc-per-node {args.n_gpu} -m sepo.train"
        )


def _has_gpu(args: SePOConfig) -> bool:
    return args.device.type != "cpu"
