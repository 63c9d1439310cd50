"""TRL as its users run it: its trainers and collators, its defaults where nothing is said.

A pair comes to the collator as the token ids that everybody trains on.
"""

import os
from dataclasses import dataclass

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Trainer

from bench.contender import Contender, missing
from bench.measure import said
from bench.steps import work
from bench.steps.models import TRAINERS, Weights, num_bytes, twin
from sepo.data.types import ScoredPair
from sepo.trainer.layers import use_liger

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
TEXT = [{"id": "0", "prompt": "a", "chosen": "b", "rejected": "c"}]  # what a trainer asks for


@dataclass(frozen=True)
class Variant:
    name: str
    objective: str
    checkpointing: bool = False  # gradient checkpointing is TRL's default, and not ours
    cached: bool = False  # as after precompute_ref_log_probs
    liger: bool = False  # Liger's kernels in the layers, which need a GPU


VARIANTS = (
    Variant("TRL DPO", "dpo"),
    Variant("TRL DPO, checkpointing", "dpo", checkpointing=True),
    Variant("TRL DPO, cached reference", "dpo", cached=True),
    Variant("TRL SimPO", "simpo"),
    Variant("TRL SimPO, checkpointing", "simpo", checkpointing=True),
    Variant("TRL DPO, Liger layers", "dpo", liger=True),
    Variant("TRL DPO, Liger layers, checkpointing", "dpo", checkpointing=True, liger=True),
    Variant("TRL SimPO, Liger layers", "simpo", liger=True),
)


def kept(
    rows: list[dict],  # id, prompt, chosen and rejected, as text or messages
    weights: Weights,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> set[str]:
    """Ids of the rows that DPOTrainer keeps; of all where TRL is missing."""
    if missing("trl"):
        return {row["id"] for row in rows}
    options = dict(max_length=max_length, bf16=False, checkpointing=False)
    trainer = dpo_trainer(weights.twin(), weights.twin(), tokenizer, rows, **options)
    return set(trainer.train_dataset["id"])


def contenders(
    weights: Weights,
    rounds: list[list[ScoredPair]],  # with the reference's log-probabilities
    tokenizer: PreTrainedTokenizerBase | None,  # None: the tokens are drawn, any will do
    *,
    bf16: bool,
    max_length: int,
) -> list[Contender]:
    if absent := missing("trl"):
        return [_absent(v, absent) for v in VARIANTS]
    tokenizer = tokenizer or letters()
    options = dict(bf16=bf16, max_length=max_length)
    on_gpu = weights.model.device.type == "cuda"
    wanted = [v for v in VARIANTS if on_gpu or not v.liger]
    return [_try(v, weights, rounds, tokenizer, **options) for v in wanted]


def _try(variant: Variant, *args, **options) -> Contender:
    """A TRL that does not go with this transformers is out; the others are still to be measured."""
    if variant.liger and (absent := missing("liger-kernel")):
        return _absent(variant, absent)
    try:
        return _contender(variant, *args, **options)
    except Exception as error:
        return _absent(variant, said(error))


def _absent(variant: Variant, reason: str) -> Contender:
    about = dict(objective=variant.objective, group="trl")
    return Contender(variant.name, None, lambda inputs: reason, **about)


def _contender(
    variant: Variant, weights: Weights, rounds, tokenizer, *, bf16: bool, max_length: int
) -> Contender:
    model, is_dpo = weights.twin(), variant.objective == "dpo"
    options = dict(max_length=max_length, bf16=bf16, checkpointing=variant.checkpointing)
    if is_dpo:
        reference = twin(weights.reference)
        trainer = dpo_trainer(model, reference, tokenizer, TEXT, **options)
        trainer.precompute_ref_logps = variant.cached
    else:
        trainer = simpo_trainer(model, tokenizer, TEXT, **options)
    trainer.current_gradient_accumulation_steps = 1  # Trainer's loop sets it
    if variant.checkpointing:  # so does it this
        model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    live = is_dpo and not variant.cached
    if variant.liger:  # layers alone, and no loss: as use_liger_kernel has them in its DPO trainer
        for llama in (model, trainer.ref_model) if live else (model,):
            use_liger(llama)
    if live:  # TRL has wrapped it already; without the wrapper it computes in float32
        wrapped = trainer.ref_model.forward
        trainer.ref_model.forward = getattr(trainer.ref_model, "_original_forward", wrapped)

    def lower() -> None:
        trainer.accelerator.prepare_model(model)
        if live:
            trainer.ref_model.forward = wrapped

    batch = dpo_batch if is_dpo else simpo_batch
    examples = [batch(pairs) for pairs in rounds]
    collated = lambda number: trainer.data_collator(examples[number])
    # TRL's own head takes the labelled positions on a GPU, and all but the last on a CPU
    how = dict(live=live, used_alone=is_dpo and model.device.type == "cuda", unused=int(is_dpo))
    return Contender(
        variant.name, lambda number: trainer.training_step(model, collated(number)), objective=variant.objective, group="trl", lower=lower,
        work=lambda number: work.padded(model, rounds[number], **how),
        note=lambda inputs: "tokens and rows once more by the reference" if live else "",
        keeps_bytes=num_bytes(weights.reference) if live else 0,
    )  # fmt: skip


def dpo_trainer(
    model: PreTrainedModel, reference: PreTrainedModel, tokenizer, rows: list[dict], **options
) -> Trainer:
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(TRAINERS, beta=0.1, **_arguments(model, **options))
    data = dict(train_dataset=_dataset(rows), processing_class=tokenizer)
    return DPOTrainer(model, ref_model=reference, args=config, **data)


def simpo_trainer(model: PreTrainedModel, tokenizer, rows: list[dict], **options) -> Trainer:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    # without cpo_alpha=0 it is CPO-SimPO, with a likelihood term
    simpo = dict(loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=1.0)
    config = CPOConfig(TRAINERS, **simpo, **_arguments(model, **options))
    data = dict(train_dataset=_dataset(rows), processing_class=tokenizer)
    return CPOTrainer(model, args=config, **data)


def _dataset(rows: list[dict]):
    from datasets import Dataset  # TRL needs it, and nothing else here

    return Dataset.from_list(rows)


def _arguments(model, *, max_length: int, bf16: bool, checkpointing: bool) -> dict:
    return dict(
        max_length=max_length, bf16=bf16, gradient_checkpointing=checkpointing,
        use_cpu=model.device.type == "cpu", report_to="none", disable_tqdm=True,
    )  # fmt: skip


def dpo_batch(pairs: list[ScoredPair]) -> list[dict]:
    """What DPOTrainer's collator takes; the reference's sums are read if it is cached."""
    return [
        {
            "prompt_ids": pair.prompt.tolist(),
            "chosen_ids": pair.chosen.tolist(),
            "rejected_ids": pair.rejected.tolist(),
            "ref_chosen_logps": float(pair.chosen_ref_logp.sum()),
            "ref_rejected_logps": float(pair.rejected_ref_logp.sum()),
        }
        for pair in pairs
    ]


def simpo_batch(pairs: list[ScoredPair]) -> list[dict]:
    """What CPOTrainer's collator takes."""
    found = []
    for pair in pairs:
        prompt = pair.prompt.tolist()
        row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side in ("chosen", "rejected"):
            response = getattr(pair, side).tolist()
            row[f"{side}_input_ids"] = prompt + response
            row[f"{side}_attention_mask"] = [1] * (len(prompt) + len(response))
            row[f"{side}_labels"] = [-100] * len(prompt) + response
        found.append(row)
    return found


def letters() -> PreTrainedTokenizerBase:
    """A tokenizer of a few letters, for trainers that want one."""
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "a", "b", "c"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
