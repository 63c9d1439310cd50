"""Where TRL does something else, shown: what its trainers make of rows that ours read otherwise.

A test that fails here after an upgrade means that TRL has changed: then the comparison has too.
"""

import logging
import warnings

import pytest
import torch
from tiny import tiny_model
from tokenizers_for_tests import chat, chatml_tokenizer, llama2_tokenizer, one

from bench.contender import missing
from bench.steps import trl
from bench.steps.case import be_quiet
from bench.steps.pairs import text
from sepo.data.read.formats import DroppedRow, DropReason

pytestmark = pytest.mark.skipif(missing("trl") is not None, reason="trl is not installed")
OPTIONS = dict(bf16=False, checkpointing=False)
be_quiet()


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(logging.getLogger("trl"), "level", logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def prepared():
    """A row as (prompt, chosen, rejected) texts: from our tokens, or from TRL's data sets."""
    words = lambda tokenizer, ids: [tokenizer.decode([i]) for i in ids]

    def of(who, preference, tokenizer, max_length=64):
        if who == "ours":
            pair = one(preference, tokenizer, max_length=max_length).pair
            return [words(tokenizer, ids) for ids in (pair.prompt, pair.chosen, pair.rejected)]
        options = OPTIONS | {"max_length": max_length}
        model = lambda: tiny_model(vocab_size=len(tokenizer))
        rows = [text(preference)]
        if who == "dpo":
            row = trl.dpo_trainer(model(), model(), tokenizer, rows, **options)
            row = row.train_dataset[0]
            return [words(tokenizer, row[f"{x}_ids"]) for x in ("prompt", "chosen", "rejected")]
        row = trl.simpo_trainer(model(), tokenizer, rows, **options).train_dataset[0]
        start = {side: row[f"{side}_labels"].count(-100) for side in ("chosen", "rejected")}
        prompts = [words(tokenizer, row[f"{side}_input_ids"][:n]) for side, n in start.items()]
        answers = [words(tokenizer, row[f"{side}_input_ids"][n:]) for side, n in start.items()]
        return [prompts, *answers]

    return of


def test_trl_trains_on_what_comes_after_the_end_of_the_turn(prepared):
    """A model stops at its end-of-turn token: what follows is never asked of it."""
    row = chat("The river is wide.", "The answer"), chatml_tokenizer()
    ours, dpo, simpo = (prepared(who, *row) for who in ("ours", "dpo", "simpo"))
    for side in (1, 2):
        assert ours[side][-1] == "<|im_end|>"
        assert dpo[side] == [*ours[side], "\n"]
        assert simpo[side][-3:] == ["<|im_end|>", "\n", "<|im_end|>"]


def test_trl_simpo_gives_the_two_responses_two_prompts(prepared):
    """A merge over the boundary of one response only: the scores are of unlike sets of tokens."""
    row = chat("The river is wide.", "Hello"), chatml_tokenizer()
    (after_chosen, after_rejected), chosen, rejected = prepared("simpo", *row)
    assert after_chosen[-1] == "assistant\n" and after_rejected[-1] == "<|im_start|>"
    assert chosen[0] == "The river" and rejected[0] == "assistant\nHello"
    prompt, chosen, rejected = prepared("ours", *row)
    assert prompt[-1] == "<|im_start|>"
    assert chosen[0] == "assistant\n" and rejected[0] == "assistant\nHello"


def test_trl_dpo_trains_on_the_end_of_the_prompt(prepared):
    """The template trims or merges there: the prompt rendered alone is no prefix of the whole."""
    row = chat("The river is wide.", "Hello"), llama2_tokenizer()
    prompt, chosen, _ = prepared("dpo", *row)
    assert "".join(prompt) == "<s>[INST] " and chosen[0].startswith("Tell me [/INST]")
    prompt, chosen, _ = prepared("ours", *row)
    assert "".join(prompt) == "<s>[INST] Tell me [/INST] " and chosen[0] == "The river"
    with pytest.raises(ValueError, match="should have the same length"):
        prepared("simpo", *row)


def test_trl_simpo_is_nan_where_the_prompt_fills_max_length():
    """One such row of the batch is enough; DPOTrainer drops it without a word, we with a count."""
    tokenizer = chatml_tokenizer()
    short, full = chat("The river", "Hello"), chat("The river", "Hello", "Tell me more. " * 30)
    assert one(full, tokenizer, max_length=64) == DroppedRow("7", DropReason.NO_ROOM)
    rows = [text(short) | {"id": "short"}, text(full) | {"id": "full"}]
    model, options = tiny_model(vocab_size=len(tokenizer)), OPTIONS | {"max_length": 64}
    reference = tiny_model(vocab_size=len(tokenizer))
    dpo = trl.dpo_trainer(model, reference, tokenizer, rows, **options)
    assert dpo.train_dataset["id"] == ["short"]

    model = tiny_model(vocab_size=len(tokenizer))
    simpo = trl.simpo_trainer(model, tokenizer, rows, **options)
    simpo.current_gradient_accumulation_steps = 1
    step = lambda rows: simpo.training_step(model, simpo.data_collator(rows))
    assert torch.isfinite(step([simpo.train_dataset[0]]))
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    model.zero_grad()
    assert torch.isnan(step([simpo.train_dataset[0], simpo.train_dataset[1]]))
    assert all(torch.isnan(p.grad).any() for p in model.parameters())
