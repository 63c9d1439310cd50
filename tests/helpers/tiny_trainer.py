"""A trainer of a tiny model on a few pairs, and what a test reads of it."""

import torch
from tiny import random_scored_pairs, tiny_model

from sepo import SePOConfig, SePOTrainer
from sepo.data import TokenPair
from sepo.trainer.methods import METHODS

PAIRS = random_scored_pairs(13)
LONGEST = max(map(len, PAIRS))  # the least budget that serves every method


def make_trainer(
    tmp_path, *, arch="llama", dtype=torch.float32, pairs=PAIRS, eval_pairs=PAIRS[:4], model=None,
    reference_model=None, peft_config=None, **args,
):  # fmt: skip
    defaults = dict(
        output_dir=str(tmp_path),
        pairs_per_step=5,
        learning_rate=0.05,
        optim="sgd",
        max_grad_norm=0.0,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    model = tiny_model(arch, dtype=dtype) if model is None else model
    config = SePOConfig(**{**defaults, **args})
    if METHODS[config.method].direction and reference_model is None and peft_config is None:
        reference_model = tiny_model(arch, dtype=dtype, seed=1)
    more = dict(reference_model=reference_model, peft_config=peft_config)
    return SePOTrainer(model, config, pairs, eval_pairs, **more)


def bare(pairs):
    """The same pairs without scores and without a cached reference."""
    tokens = lambda p: {name: getattr(p, name) for name in ("id", "prompt", "chosen", "rejected")}
    return [TokenPair(**tokens(p)) for p in pairs]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
