"""Ours: SePOTrainer, a trainer a round, so that a step is exactly the round's pairs."""

import time
from contextlib import nullcontext
from dataclasses import asdict, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from bench.contender import Contender
from bench.steps import work
from bench.steps.models import TRAINERS, Weights, checkpoint_layers, num_bytes, twin
from bench.steps.objectives import SETTINGS, segments
from sepo.cost.work import Schedule
from sepo.data.hidden import HiddenRows, StoredHead
from sepo.data.types import ScoredPair, TokenPair
from sepo.errors import InputError
from sepo.masks import SparseMask, num_layers
from sepo.model.forward import head
from sepo.model.prepare import explain_attention, prepare_model
from sepo.model.reference import CachedReference
from sepo.score.logp import Asked, answers_of, response_logp
from sepo.trainer.config import SePOConfig
from sepo.trainer.step import MASK
from sepo.trainer.trainer import SePOTrainer

NAMES = {"dpo": "dpo, cached reference", "simpo": "simpo", "sepo": "sepo 30 %"}


def reference_logp(
    weights: Weights, pairs: list[ScoredPair]
) -> tuple[list[ScoredPair], float]:  # with the reference's log-probabilities; seconds a pair
    reference = prepare_model(twin(weights.reference))
    start = time.perf_counter()
    logp = response_logp(reference, pairs, "reference", max_tokens=8192)
    seconds = (time.perf_counter() - start) / len(pairs)
    both = [dict(chosen_ref_logp=chosen, rejected_ref_logp=rejected) for chosen, rejected in logp]
    return [replace(pair, **two) for pair, two in zip(pairs, both, strict=True)], seconds


def contenders(
    weights: Weights,
    rounds: list[list[ScoredPair]],  # with the reference's log-probabilities
    *,
    bf16: bool,
    attn_impls: tuple[str | None, ...] = (None,),  # None: what the trainer takes by itself
) -> list[Contender]:
    make = lambda name, objective, impl, **options: contender(
        name, objective, weights, rounds, bf16=bf16, impl=impl, **options
    )
    first, name = attn_impls[0], NAMES["sepo"]
    return [
        *(make(NAMES[objective], objective, impl) for impl in attn_impls for objective in NAMES),
        make(f"{name}, cheap again", "sepo", first, selective=True),
        make(f"{name}, checkpointing", "sepo", first, checkpointing=True),
    ]


def kl_contenders(
    objective: str, weights: Weights, rounds: list[list[TokenPair]], *, bf16: bool
) -> list[Contender]:
    """With the reference beside the policy, and with the rows that a store keeps of it."""
    live = twin(weights.reference)
    make = lambda note, pairs=rounds, reference=live, **options: contender(
        f"{objective}{note}", objective, weights, pairs, bf16=bf16, reference=reference, **options
    )
    found = [make("")]
    if objective == "tdpo2":  # a mask reads the reference's layers, which no store keeps
        found.append(make(", cached rows", *cached(weights, rounds)))
    again = make(", checkpointing", checkpointing=True)
    return [*found, make(", cheap again", selective=True), replace(again, rounds=0)]


def contender(
    name: str,
    objective: str,
    weights: Weights,
    rounds: list[list[TokenPair]],  # with what the objective reads of a cached reference
    settings: dict | None = None,  # as SePOConfig takes them; None: the objective's of SETTINGS
    *,
    bf16: bool,
    reference: PreTrainedModel | CachedReference | None = None,
    impl: str | None = None,
    checkpointing: bool = False,
    selective: bool = False,  # --selective_checkpointing
) -> Contender:
    arguments = SETTINGS[objective] if settings is None else settings
    about = dict(objective=objective, ours=True, group="sepo", attention=impl or "")
    on_cpu = weights.model.device.type == "cpu"
    arguments = arguments | ({"attn_impl": impl} if impl else {})
    if checkpointing:  # False is deprecated in one transformers, and None no value in another
        arguments |= {"gradient_checkpointing": True}
    config = lambda pairs: SePOConfig(
        output_dir=TRAINERS, method=objective, pairs_per_step=len(pairs), bf16=bf16,
        max_tokens_per_batch=1 << 30,  # the step in one micro-batch, as TRL's
        selective_checkpointing=selective, use_cpu=on_cpu, report_to="none", disable_tqdm=True,
        **arguments,
    )  # fmt: skip
    model = weights.twin()
    try:
        trainers = [
            SePOTrainer(model, config(pairs), train_dataset=pairs, reference_model=reference)
            for pairs in rounds
        ]
    except InputError as error:
        reason = str(error)
        return Contender(name, None, lambda inputs: reason, **about)
    if hasattr(model, MASK):  # each trainer has drawn a mask of its own
        setattr(model, MASK, getattr(weights.twin(), MASK))
    how = explain_attention(model, dtype=torch.bfloat16 if bf16 else None)
    if checkpointing:
        checkpoint_layers(model)

    step = lambda number: trainers[number].training_step(model, {"step": 0})
    live, cached = isinstance(reference, nn.Module), isinstance(reference, CachedReference)

    # of cached rows the reference's head alone is computed
    schedule = Schedule(reference="live" if live else "cached" if cached else "none", kl=cached)
    asked = lambda number: work.packed(model, segments(objective, rounds[number]), schedule)
    # the gate asks for float32 first: of round 0 alone, with neither of accelerate's two autocasts
    accelerator = trainers[0].accelerator
    accelerator.autocast = nullcontext

    def lower() -> None:
        del accelerator.autocast
        accelerator.prepare_model(model)

    keeps = num_bytes(reference) if live else reference.stored.weight.nbytes if cached else 0
    return Contender(
        name, step, work=asked, lower=lower, keeps_bytes=keeps, **about,
        note=lambda inputs: "attention: " + how.partition(";")[0],
        float32=impl not in ("varlen", "flex"),  # whose kernels take 16-bit inputs only
    )  # fmt: skip


def cached(
    weights: Weights, rounds: list[list[TokenPair]]
) -> tuple[list[list[ScoredPair]], CachedReference]:
    """The rounds as `sepo score --keep hidden` leaves them, in memory.

    Round 0, the gate's, has its rows in float32: a store's bfloat16 would be seen there, and hide
    what else is wrong.
    """
    reference = prepare_model(twin(weights.reference))
    dtypes = [torch.float32] + [torch.bfloat16] * (len(rounds) - 1)
    kept = [with_rows(reference, pairs, of) for pairs, of in zip(rounds, dtypes, strict=True)]
    return kept, CachedReference(StoredHead(*head(reference)))


def with_rows(reference, pairs: list[TokenPair], dtype: torch.dtype) -> list[ScoredPair]:
    asked = {"reference": Asked(reference, states=dtype)}
    ((_, answers),) = answers_of([pairs], asked, max_tokens=8192)
    rows = answers["reference"].states
    found, end = [], 0
    for pair in pairs:
        parts = {}
        for side in ("chosen", "rejected"):
            start, end = end, end + len(getattr(pair, side))
            parts[f"{side}_ref_hidden"] = HiddenRows(rows, start, end - start)
        found.append(ScoredPair(**asdict(pair) | parts))
    return found


def new_mask(weights: Weights) -> SparseMask:
    """As it is when it has learned: with a new one all masks are near 0, and so is every gradient."""
    torch.manual_seed(0)
    model = weights.reference
    mask = SparseMask(num_layers(model), model.config.hidden_size)
    with torch.no_grad():
        mask.reward.mixer.normal_()
    return mask.to(model.device)
