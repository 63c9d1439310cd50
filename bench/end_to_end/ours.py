"""Ours: SePOTrainer, a trainer a round, so that a step is exactly the round's pairs."""

import tempfile
import time
from contextlib import nullcontext

import torch
from torch import Tensor

from bench.end_to_end import flops
from bench.end_to_end.contender import Contender, Work
from bench.end_to_end.objectives import SETTINGS, segments
from bench.end_to_end.rows import with_reference
from bench.end_to_end.weights import Weights, twin
from sepo.config import SePOConfig
from sepo.data.segments import num_selected
from sepo.data.types import ScoredPair
from sepo.errors import InputError
from sepo.model import explain_attention, prepare_model
from sepo.response_logp import response_logp
from sepo.trainer import SePOTrainer

NAMES = {"dpo": "dpo, cached reference", "simpo": "simpo", "sepo": "sepo 30 %"}


def reference_logp(
    weights: Weights, pairs: list[ScoredPair]
) -> tuple[list[ScoredPair], float]:  # with the reference's log-probabilities; seconds a pair
    reference = prepare_model(twin(weights.reference))
    start = time.perf_counter()
    logp = response_logp(reference, pairs, "reference", max_tokens=8192)
    return with_reference(pairs, logp), (time.perf_counter() - start) / len(pairs)


def contenders(
    weights: Weights,
    rounds: list[list[ScoredPair]],  # with the reference's log-probabilities
    *,
    bf16: bool,
    attn_impls: tuple[str | None, ...] = (None,),  # None: what the trainer takes by itself
) -> list[Contender]:
    variants = [(objective, impl, False) for impl in attn_impls for objective in NAMES]
    variants.append(("sepo", attn_impls[0], True))
    return [_contender(weights, rounds, bf16, *variant) for variant in variants]


def _contender(
    weights: Weights,
    rounds: list[list[ScoredPair]],
    bf16: bool,
    objective: str,
    impl: str | None,
    checkpointing: bool,
) -> Contender:
    name = NAMES[objective] + (", checkpointing" if checkpointing else "")
    found = Contender(name, "sepo", objective, None, None, attention=impl or "")
    on_cpu = weights.model.device.type == "cpu"
    arguments = SETTINGS[objective] | ({"attn_impl": impl} if impl else {})
    folder = tempfile.TemporaryDirectory()
    config = lambda pairs: SePOConfig(
        output_dir=folder.name,
        method=objective,
        pairs_per_step=len(pairs),
        max_tokens_per_batch=None,  # the step in one micro-batch, as TRL's
        bf16=bf16,
        gradient_checkpointing=checkpointing,
        use_cpu=on_cpu,
        report_to="none",
        disable_tqdm=True,
        **arguments,
    )
    model = weights.twin()
    try:
        trainers = [SePOTrainer(model, config(pairs), train_dataset=pairs) for pairs in rounds]
    except InputError as error:
        found.absent = str(error)
        return found
    how = explain_attention(model, dtype=torch.bfloat16 if bf16 else None)
    found.note = "attention: " + how.partition(";")[0]
    if checkpointing:  # Trainer's loop does it
        model.gradient_checkpointing_enable()

    def step(number: int) -> Tensor:
        assert folder  # lives as long as the trainers that may write to it
        return trainers[number].training_step(model, {"step": 0})

    def work(number: int) -> Work:
        cut = segments(objective, rounds[number])
        sizes = [(len(p), len(c.response), len(r.response)) for p, c, r in cut]
        rows = sum(map(num_selected, cut))
        tokens = sum(map(sum, sizes))
        return Work(tokens, rows, flops.training(model, sizes, rows, prompt_once=True))

    # the gate asks for float32 first: of round 0 alone, with neither of accelerate's two autocasts
    accelerator = trainers[0].accelerator
    accelerator.autocast = nullcontext

    def lower() -> None:
        del accelerator.autocast
        accelerator.prepare_model(model)

    found.step, found.work, found.lower = step, work, lower
    # the kernels of these take 16-bit inputs only
    found.float32 = impl not in ("varlen", "flex")
    return found
