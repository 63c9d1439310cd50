from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from placing import any_text, check_by_the_byte, check_nasty, check_pair, read
from tokenizers import AddedToken
from tokenizers_for_tests import (
    CHATML,
    LLAMA2,
    chat,
    chatml_tokenizer,
    llama2_tokenizer,
    one,
    plain,
    plain_tokenizer,
)
from vocabularies import ALL, NASTY, TRAINED

from sepo.data import transfer_scores, transfer_selection
from sepo.data.align import TokenBytes, shift
from sepo.data.read.render import spans
from sepo.errors import InputError


def bounds_of(*lengths):
    return np.append(0, np.cumsum(lengths, dtype=np.int64))


# --- tokens against tokens


@pytest.mark.parametrize(
    "selected, expected", [([0], [0, 1]), ([1], [1]), ([2], [2]), ([0, 1], [0, 1])]
)
def test_the_papers_misunderstandings(selected, expected):
    source = bounds_of(*map(len, ("misunderstand", "ing", "s")))
    target = bounds_of(*map(len, ("mis", "understanding", "s")))
    assert transfer_selection(np.array(selected), source, target).tolist() == expected
    score = np.array([0.5, -2, 3], np.float32)
    (_, mean, _), (_, high, _), (_, low, _) = (
        transfer_scores(score, source, target, aggregate=how) for how in ("mean", "max", "min")
    )
    assert mean == np.float32((10 * 0.5 + 3 * -2) / 13) and (high, low) == (0.5, -2)


bounds = st.lists(st.integers(0, 5), min_size=1, max_size=12).map(lambda l: bounds_of(*l))


@given(bounds, bounds, st.integers(0, 5), st.integers(0, 99))
def test_any_bounds_against_the_definition(source, target, later, seed):
    check_by_the_byte(source + later, target, seed)
    check_by_the_byte(source, target + later, seed)


@given(bounds, st.sampled_from(["mean", "max", "min"]), st.integers(0, 99))
def test_the_same_tokens_keep_their_scores_bit_for_bit(cuts, aggregate, seed):
    score = np.random.default_rng(seed).normal(size=len(cuts) - 1).astype(np.float32)
    found = transfer_scores(score, cuts, cuts, aggregate=aggregate)
    assert np.array_equal(found, np.where(np.diff(cuts) > 0, score, np.nan), equal_nan=True)


def test_wrong_arguments_are_named():
    with pytest.raises(InputError, match="expected 3 bounds for 2 scores, got 2"):
        transfer_scores(np.zeros(2, np.float32), bounds_of(1), bounds_of(1))
    with pytest.raises(InputError, match="aggregate: expected mean, max or min, got median"):
        transfer_scores(np.zeros(1, np.float32), bounds_of(1), bounds_of(1), aggregate="median")


# --- tokens in their text


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("text", NASTY)
def test_bounds_are_where_decoding_says(name, text):
    check_nasty(name, text)


@pytest.mark.parametrize("source, target", [*product(TRAINED, TRAINED)])
@any_text(examples=25)
def test_any_text_between_any_two(source, target, response, seed):
    check_pair(source, target, response, seed)


def test_a_blank_behind_a_special_token_is_nobodys():
    text = "a</s>the</s> river"
    ids, _, placed = read("legacy sentencepiece", plain("Say:", text, "no"))
    pieces = ALL["legacy sentencepiece"]().convert_ids_to_tokens(ids.tolist())
    spelt = "".join(pieces[:-1]).replace("▁", " ")
    assert spelt.endswith("a</s> the</s>  river")  # two more blanks than the text
    stretches = zip(placed.bounds, placed.bounds[1:], strict=False)
    held = [text[start:end] for start, end in stretches]
    assert "".join(held) == text and held.count("</s>") == 2


def test_an_added_token_is_the_text_that_it_is_written_as():
    for make, content in ((chatml_tokenizer, "Ġo<>"), (llama2_tokenizer, "▁x<>")):
        tokenizer = make.__wrapped__()
        tokenizer.add_tokens(AddedToken(content, normalized=False))
        row = plain("Say:", f"so {content} it is", "no")
        ids, span = one(row, tokenizer).pair.chosen, spans(row, tokenizer)[0]
        placed = TokenBytes(tokenizer).place(ids, span)
        (at,) = np.flatnonzero(ids == tokenizer.convert_tokens_to_ids(content))
        assert placed.bounds[at : at + 2].tolist() == [3, 3 + len(content.encode())]


def test_of_a_token_that_begins_in_the_prompt_the_response_counts():
    ids, span, placed = read("sentencepiece", plain("th", "e answer", "no"))
    assert ALL["sentencepiece"]().convert_ids_to_tokens([int(ids[0])]) != ["e"]
    assert placed.bounds[0] == 0 and placed.bounds[-1] == len("e answer") + 1


def test_templates_that_trim_and_templates_that_do_not():
    policy = ALL["sentencepiece"]()
    assert policy.chat_template == LLAMA2 and ALL["byte-level"]().chat_template == CHATML
    conversation = chat("  Hello you. \n", "no")
    spans_, places = [], []
    for name in ("byte-level", "sentencepiece"):
        _, span, placed = read(name, conversation)
        spans_.append(span.text[span.start : span.end].encode())
        places.append(placed)
    assert spans_ == [b"  Hello you. \n", b"Hello you."] and shift(*spans_) == -2
    moved = places[0].moved(-2, len(spans_[1]))
    assert moved.bounds[-1] == places[1].bounds[-1] == len("Hello you.") + 1
    assert moved.bounds[0] == 0 and moved.has_end
    back = places[1].moved(2, len(spans_[0]))
    assert back.bounds[0] == 2 and back.bounds[-1] == len("  Hello you. \n") + 1


@pytest.mark.parametrize(
    "source, target, expected",
    [
        (b"a b", b"a b", 0),
        (b" a b", b"a b\n", -1),
        (b"a b", b"<think>\n</think>\n\na b", 18),
        (b"<think></think>a b", b"a b", -15),
        (b"a b", b"a c", None),
        (b"a", b"ana", None),  # in two places
        (b" ", b"\n", None),
    ],
)
def test_one_response_in_two_templates(source, target, expected):
    assert shift(source, target) == expected


@pytest.mark.parametrize("name", TRAINED)
def test_a_response_cut_at_max_length(name):
    text = "The answer is the river, and the world is wide."
    row = plain("Say:", text, "no")
    whole = read(name, row)[2].bounds
    num_prompt = len(one(row, ALL[name]()).pair.prompt)
    ids, _, placed = read(name, row, max_length=num_prompt + 3)
    assert len(ids) == 3
    assert placed.is_cut and not placed.has_end
    assert placed.bounds.tolist() == whole[: len(ids) + 1].tolist() and placed.bounds[-1] < len(
        text
    )


def test_a_response_cut_at_a_special_token_in_its_text():
    text = "a<|im_end|>The answer is the river."
    tokenizer = ALL["byte-level"]()
    row = plain("Say:", text, "no")
    num_prompt = len(one(row, tokenizer).pair.prompt)
    ids, _, placed = read("byte-level", row, max_length=num_prompt + 2)
    assert ids.tolist()[-1] == tokenizer.eos_token_id
    assert not placed.has_end and placed.is_cut and placed.bounds[-1] == len("a<|im_end|>")


def test_a_response_without_an_end_token():
    _, _, placed = read("byte-level", plain("Say:", "The river.", "no"), append_eos=False)
    assert not placed.has_end and not placed.is_cut and placed.bounds[-1] == len("The river.")


# --- tokens that are not those of the text


def test_a_tokenizer_that_normalises_is_found_out():
    tokenizer = plain_tokenizer()
    tokens = TokenBytes(tokenizer)
    for text, is_right in (("caf\u00e9", True), ("cafe\u0301", False)):
        row = plain("Say:", text, "no")
        placed = tokens.place(one(row, tokenizer).pair.chosen, spans(row, tokenizer)[0])
        assert (placed is not None) == is_right


def test_lower_case_and_unknown_characters_and_a_written_blank_are_found_out():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate("?:abn o")}, "?"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="?", unk_token="?")
    cases = [(letters, "ab", True), (letters, "Ab", False), (letters, "az", False)]
    cases += [(ALL["sentencepiece"](), "a▁b", False), (ALL["byte-level"](), "a▁b", True)]
    for tokenizer, text, is_right in cases:
        row = plain("ab:", text, "no")
        placed = TokenBytes(tokenizer).place(
            one(row, tokenizer).pair.chosen, spans(row, tokenizer)[0]
        )
        assert (placed is not None) == is_right, text


def test_another_response_is_found_out():
    tokenizer = chatml_tokenizer()
    tokens = TokenBytes(tokenizer)
    ids = one(plain("Say:", "The river is wide.", "no"), tokenizer).pair.chosen
    for other in ("The river is wide", "The river is wide. Yes.", "The River is wide.", "e."):
        assert tokens.place(ids, spans(plain("Say:", other, "no"), tokenizer)[0]) is None


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(InputError, match="expected a fast tokenizer, .*, got SimpleNamespace"):
        TokenBytes(SimpleNamespace(is_fast=False))
