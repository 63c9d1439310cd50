"""Short runs of TRL's trainers on tiny models, with sepo's head or with TRL's own."""

import math
import os
import warnings
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import TrainerCallback

from sepo import patch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

PAIRS = [
    {"prompt": "w3 w4", "chosen": "w5 w6 w7", "rejected": "w8"},
    {"prompt": "w9", "chosen": "w2", "rejected": "w11 w12 w13 w3"},
    {"prompt": "w20 w21 w22", "chosen": "w23 w24", "rejected": "w25 w26 w27"},
    {"prompt": "w9 w30", "chosen": "w31 w32 w33 w34 w35", "rejected": "w36 w37"},
]
DATA = {
    "sft": [{"prompt": row["prompt"], "completion": " " + row["chosen"]} for row in PAIRS],
    "dpo": PAIRS,
    "kto": [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in PAIRS
        for side in ("chosen", "rejected")
    ],
    "grpo": [{"prompt": row["prompt"]} for row in PAIRS],
    "rloo": [{"prompt": row["prompt"]} for row in PAIRS],
}
ROLLOUTS = dict(num_generations=2, max_completion_length=6, temperature=0.7)
SAMPLED = {
    "grpo": ROLLOUTS | dict(beta=0.05),  # 0 would load no reference
    "rloo": ROLLOUTS | dict(beta=0.05),
    "distillation": dict(max_completion_length=6, temperature=0.7),
}
REWARDED = "grpo", "rloo"
KINDS = tuple(DATA)  # whose forward TRL gives its head
DATA["distillation"] = DATA["grpo"]


class Gradients(TrainerCallback):
    """Those of every step, as the optimiser gets them."""

    def __init__(self):
        self.of_steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        self.of_steps.append(found)


@dataclass
class Run:
    """What a trainer logged, and every step's gradients by parameter."""

    log: list[dict[str, float]]
    gradients: list[dict[str, torch.Tensor]]


def train(folder, kind: str, patched: bool, *, model=None, peft_config=None, **how) -> Run:
    """Train two steps; `patched` puts sepo's head under the trainer while it is made and runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's and peft's, of names that go
        with patch.trl() if patched else nullcontext():
            seen = Gradients()
            made = trainer(folder, kind, model=model, peft_config=peft_config, **how)
            made.add_callback(seen)
            made.train()
    # times differ, and so would what is made of them
    lines = [
        {k: v for k, v in line.items() if "time" not in k and "second" not in k}
        for line in made.state.log_history
    ]
    return Run(lines, seen.of_steps)


def trainer(folder, kind: str, *, model=None, peft_config=None, **how):
    """Make one on four rows: SGD, float32, no shuffling but by its seed."""
    import trl
    from datasets import Dataset

    name = "Distillation" if kind == "distillation" else kind.upper()
    options = dict(
        per_device_train_batch_size=4, max_steps=2, logging_steps=1, learning_rate=0.05,
        optim="sgd", lr_scheduler_type="constant", bf16=False, use_cpu=True, report_to="none",
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    args = getattr(trl, f"{name}Config")(str(folder), **options | SAMPLED.get(kind, {}) | how)
    model = model or tiny_model()
    reference = tiny_model(model.config.model_type, seed=1)
    more = dict(reward_funcs=reward) if kind in REWARDED else {}
    if kind == "distillation":
        more["teacher_model"] = reference
    elif kind in REWARDED:  # these load it themselves
        model.config._name_or_path = str(folder)
        reference.save_pretrained(folder)  # the first rank does, and the others wait for it
        args.distributed_state.wait_for_everyone()
    elif kind != "sft" and peft_config is None:
        more["ref_model"] = reference
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return getattr(trl, f"{name}Trainer")(
        model,
        args=args,
        train_dataset=Dataset.from_list(DATA[kind]),
        eval_dataset=Dataset.from_list(DATA[kind][:3]) if "eval_strategy" in how else None,
        processing_class=tokenizer,
        peft_config=peft_config,
        **more,
    )


def reward(completions: list[str], **columns) -> list[float]:
    """Any number that differs between completions."""
    return [math.sin(sum(map(ord, text))) for text in completions]


def assert_same_run(found: Run, expected: Run, *, rel: float = 1e-5) -> None:
    """Compare losses, metrics and gradients of all steps, to the rounding of float32."""
    assert len(found.log) == len(expected.log) > 1
    for line, theirs in zip(found.log, expected.log, strict=True):
        assert line.keys() == theirs.keys()
        for name, value in theirs.items():
            assert close(line[name], value, rel), (name, line[name], value)
    assert len(found.gradients) == len(expected.gradients) > 0
    for ours, theirs in zip(found.gradients, expected.gradients, strict=True):
        size = max(g.abs().max().item() for g in theirs.values())
        assert size > 1e-4
        torch.testing.assert_close(ours, theirs, rtol=10 * rel, atol=rel * size)


def close(value: float, expected: float, rel: float) -> bool:
    # a metric may be a difference of numbers near one
    return math.isclose(value, expected, rel_tol=rel, abs_tol=rel) or value is expected is None
