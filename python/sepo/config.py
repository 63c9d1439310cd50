"""SePOConfig: transformers' TrainingArguments and what preference optimisation adds."""

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from sepo.errors import InputError

MethodName = Literal["sft", "dpo", "simpo", "sepo", "sepo-rand"]
DEFAULT_BETA = {"dpo": 0.1, "simpo": 2.0}


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

    fraction: float = _help("sepo: share of a response's tokens that the loss uses.", 0.3)
    rejected_fraction: float | None = _help("sepo: the same for rejected responses, if different.")
    gamma: float = _help("sepo: scale of the score difference, per nat.", 2.0)
    margin: float = _help("sepo: the paper's lambda; 0.5 for 1B, 0.9 for 7B, 1.3 for 13B.", 0.5)
    beta: float | None = _help("dpo (default 0.1) and simpo (2): scale of the reward, per nat.")
    gamma_beta_ratio: float = _help("simpo: target margin in units of beta.", 0.5)
    label_smoothing: float = _help("dpo: probability that a pair is labelled wrongly.", 0.0)

    pairs_per_step: int = _help("Pairs of one optimiser step, over all ranks.", 128)
    max_tokens_per_batch: int | None = _help(
        "Token budget of one micro-batch; a longer pair travels alone. Changes speed and memory, "
        "never the gradient.",
        8192,
    )
    head_budget: int | None = _help("Bytes for logits or probabilities at once.")
    disable_dropout: bool = _help("Train without dropout.", True)

    learning_rate: float = _help("Peak learning rate.", 5e-7)
    num_train_epochs: float = _help("Passes over the pairs.", 1.0)
    lr_scheduler_type: str = _help("Shape of the learning rate.", "cosine")
    warmup_steps: float = _help("Steps of warm-up, or below 1 a share of all steps.", 0.05)
    logging_steps: float = _help("Steps between two lines of the log.", 1)

    def __post_init__(self):
        super().__post_init__()
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise InputError(
                    f"--{name} has no meaning here: a step is --pairs_per_step pairs, split into "
                    "micro-batches of at most --max_tokens_per_batch tokens"
                )
        for name in ("fraction", "rejected_fraction"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise InputError(f"--{name}: expected a number in (0, 1], got {value}")
        for name in ("pairs_per_step", "max_tokens_per_batch", "max_length", "head_budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name}: expected a positive number, got {value}")
        if not 0 <= self.label_smoothing < 0.5:
            raise InputError(
                f"--label_smoothing: expected a number in [0, 0.5), got {self.label_smoothing}"
            )
        if self.n_gpu > 1:
            raise InputError(
                f"{self.n_gpu} GPUs in one process: start with "
                f"torchrun --nproc-per-node {self.n_gpu} -m sepo.train"
            )
        # a checkpoint every so many steps; the plan, not a sampler, decides the order of the data
        self.remove_unused_columns = False
        if self.beta is None:
            self.beta = DEFAULT_BETA.get(self.method)
