"""Ours: SePOTrainer, a trainer a round, so that a step is exactly the round's pairs."""

import time
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.end_to_end import flops
from bench.end_to_end.contender import Contender, Folder, Work
from bench.end_to_end.models import checkpoint_layers
from bench.end_to_end.objectives import SETTINGS, segments
from bench.end_to_end.rows import with_reference
from bench.end_to_end.weights import Weights, num_bytes, twin
from sepo.data.segments import num_selected
from sepo.data.types import ScoredPair, TokenPair
from sepo.errors import InputError
from sepo.model.prepare import explain_attention, prepare_model
from sepo.model.reference import CachedReference
from sepo.score.logp import response_logp
from sepo.trainer.config import SePOConfig
from sepo.trainer.step import MASK
from sepo.trainer.trainer import SePOTrainer

RECOMPUTED = {"recompute": "cheap again", "checkpointing": "checkpointing"}
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
    variants = [(objective, impl, {}) for impl in attn_impls for objective in NAMES]
    variants.append(("sepo", attn_impls[0], dict(recompute="cheap")))
    variants.append(("sepo", attn_impls[0], dict(checkpointing=True)))
    return [
        contender(
            NAMES[objective] + "".join(f", {RECOMPUTED[key]}" for key in options),
            objective,
            weights,
            rounds,
            SETTINGS[objective],
            bf16=bf16,
            impl=impl,
            **options,
        )
        for objective, impl, options in variants
    ]


def contender(
    name: str,
    objective: str,
    weights: Weights,
    rounds: list[list[TokenPair]],  # with what the objective reads of a cached reference
    settings: dict,  # as SePOConfig takes them
    *,
    bf16: bool,
    reference: PreTrainedModel | CachedReference | None = None,
    impl: str | None = None,
    checkpointing: bool = False,
    recompute: str = "nothing",  # as SePOConfig takes it
) -> Contender:
    found = Contender(name, "sepo", objective, None, None, attention=impl or "")
    on_cpu = weights.model.device.type == "cpu"
    arguments = settings | ({"attn_impl": impl} if impl else {})
    if checkpointing:  # False is deprecated in one transformers, and None no value in another
        arguments |= {"gradient_checkpointing": True}
    folder = Folder()
    config = lambda pairs: SePOConfig(
        output_dir=folder.name,
        method=objective,
        pairs_per_step=len(pairs),
        max_tokens_per_batch=1 << 30,  # the step in one micro-batch, as TRL's
        bf16=bf16,
        recompute=recompute,
        use_cpu=on_cpu,
        report_to="none",
        disable_tqdm=True,
        **arguments,
    )
    model = weights.twin()
    try:
        trainers = [
            SePOTrainer(model, config(pairs), train_dataset=pairs, reference_model=reference)
            for pairs in rounds
        ]
    except InputError as error:
        found.absent = str(error)
        return found
    if hasattr(model, MASK):  # each trainer has drawn a mask of its own
        setattr(model, MASK, getattr(weights.twin(), MASK))
    how = explain_attention(model, dtype=torch.bfloat16 if bf16 else None)
    found.note = "attention: " + how.partition(";")[0]
    if checkpointing:
        checkpoint_layers(model)

    def step(number: int) -> Tensor:
        assert folder  # lives as long as the trainers that may write to it
        return trainers[number].training_step(model, {"step": 0})

    live, cached = isinstance(reference, nn.Module), isinstance(reference, CachedReference)

    def work(number: int) -> Work:
        cut = segments(objective, rounds[number])
        sizes = [(len(p), len(c.response), len(r.response)) for p, c, r in cut]
        rows = sum(map(num_selected, cut))
        tokens = sum(map(sum, sizes))
        more = dict(forwards=int(live), heads=int(cached))
        return Work(tokens, rows, flops.training(model, sizes, rows, prompt_once=True, **more))

    # the gate asks for float32 first: of round 0 alone, with neither of accelerate's two autocasts
    accelerator = trainers[0].accelerator
    accelerator.autocast = nullcontext

    def lower() -> None:
        del accelerator.autocast
        accelerator.prepare_model(model)

    found.step, found.work, found.lower = step, work, lower
    # the kernels of these take 16-bit inputs only
    found.float32 = impl not in ("varlen", "flex")
    if live:
        found.keeps_bytes = num_bytes(reference)
    if cached:
        found.keeps_bytes = reference.stored.weight.nbytes
    return found
