"""Bounds of tokens against definitions that go byte by byte, and against the tokenizer's decoder."""

import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import one, plain
from vocabularies import ALL, NASTY, TRAINED, table

from sepo.data import transfer_scores, transfer_selection
from sepo.data.read.formats import DroppedRow
from sepo.data.read.render import spans


def read(name, preference, **options):
    """The chosen response's ids, text and place."""
    tokenizer = ALL[name]()
    tokenised = one(preference, tokenizer, **options)
    assert not isinstance(tokenised, DroppedRow), tokenised
    ids, span = tokenised.pair.chosen, spans(preference, tokenizer)[0]
    return ids, span, table(name).place(ids, span)


def scores_by_the_byte(score, source, target, aggregate):
    """The definition: each byte has its token's score, each token what its bytes make."""
    of_byte = {}
    for token, value in enumerate(score):
        of_byte |= dict.fromkeys(range(source[token], source[token + 1]), np.float64(value))
    result = []
    for first, end in zip(target, target[1:], strict=False):
        held = [of_byte[byte] for byte in range(first, end) if byte in of_byte]
        result.append(getattr(np, aggregate)(held) if held else np.nan)
    return np.array(result)


def selected_by_the_byte(positions, source, target):
    held = {byte for token in positions for byte in range(source[token], source[token + 1])}
    stretches = zip(target, target[1:], strict=False)
    return [token for token, (a, b) in enumerate(stretches) if held & set(range(a, b))]


def check_by_the_byte(source, target, seed):
    score = np.random.default_rng(seed).normal(size=len(source) - 1).astype(np.float32)
    for aggregate in ("mean", "max", "min"):
        found = transfer_scores(score, source, target, aggregate=aggregate)
        expected = scores_by_the_byte(score, source, target, aggregate)
        # half a unit of float32, but where a sum cancels
        np.testing.assert_allclose(found, expected, rtol=6e-8, atol=1e-14)
    positions = np.flatnonzero(score > 0.5)
    found = transfer_selection(positions, source, target)
    assert found.tolist() == selected_by_the_byte(positions, source, target)
    assert found.dtype == np.int32


def check_against_decoding(name, preference, placed):
    """Where the tokenizer's own decoder says that a token ends, but inside a character."""
    tokenizer = ALL[name]()
    pair = one(preference, tokenizer).pair
    prompt = [i for i in pair.prompt.tolist() if i not in tokenizer.all_special_ids]
    text = (preference.prompt + preference.chosen).encode()
    start = len(preference.prompt.encode())
    for end in range(1, len(pair.chosen)):
        read = [*prompt, *pair.chosen[:end].tolist()]
        decoded = tokenizer.decode(read, clean_up_tokenization_spaces=False)
        if "\ufffd" not in decoded:
            assert decoded.encode() == text[: start + placed.bounds[end]]


def check_nasty(name, text):
    row = plain("Say:", NASTY[text] + "!", "no")
    ids, _, placed = read(name, row)
    size = len((NASTY[text] + "!").encode())
    assert placed.bounds[-2:].tolist() == [size, size + 1] and placed.bounds[0] == 0
    assert placed.has_end and not placed.is_cut and len(placed.bounds) == len(ids) + 1
    response = row.chosen.encode()
    for token, start, end in zip(ids[:-1], placed.bounds, placed.bounds[1:], strict=False):
        if token in ALL[name]().all_special_ids:
            piece = ALL[name]().convert_ids_to_tokens(int(token))
            assert response[start:end] == piece.encode()
    if name != "legacy sentencepiece" or text != "special tokens":  # decoding keeps its blanks
        check_against_decoding(name, row, placed)


characters = st.characters(exclude_categories=["Cs"], exclude_characters="▁")
texts = st.lists(st.text(characters, min_size=1) | st.sampled_from([*NASTY.values()]), min_size=1)


def any_text(examples):
    def decorate(test):
        test = given(response=texts.map("".join), seed=st.integers(0, 99))(test)
        quiet = [HealthCheck.too_slow]
        return settings(max_examples=examples, deadline=None, suppress_health_check=quiet)(test)

    return decorate


def check_pair(source, target, response, seed):
    assume(response.strip() and response != "no")
    placed = []
    for name in (source, target):
        if not spells(name, "Say:" + response):
            assert not is_placed(name, plain("Say:", response, "no"))
            return
        ids, _, found = read(name, plain("Say:", response, "no"))
        assert found is not None and len(found.bounds) == len(ids) + 1
        placed.append(found.bounds)
    assert placed[0][-1] == placed[1][-1] == len(response.encode()) + 1
    check_by_the_byte(*placed, seed)


def is_placed(name, preference):
    tokenised = one(preference, ALL[name]())
    if isinstance(tokenised, DroppedRow):
        return False
    span = spans(preference, ALL[name]())[0]
    return table(name).place(tokenised.pair.chosen, span) is not None


def spells(name, text):
    """SmolLM2's vocabulary lacks the bytes F1 to F4, and with them rare planes of Unicode."""
    if name in TRAINED:
        return True
    ids = ALL[name]()(text, add_special_tokens=False)["input_ids"]
    return ALL[name]().decode(ids, clean_up_tokenization_spaces=False) == text
