"""A scored store is a sequence of its pairs, and pairs are equal where their numbers are."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from tiny import random_scored_pairs
from training_run import write_store

from sepo.data import ScoredPair, TokenPair
from sepo.data.store.store import ScoredStore

PAIRS = random_scored_pairs(7)


@pytest.fixture
def store(tmp_path):
    write_store(tmp_path, PAIRS, pairs_per_part=7)
    return ScoredStore.open(tmp_path)


def test_it_is_a_sequence(store):
    assert isinstance(store, Sequence) and len(store) == 7
    assert list(store) == list(store.pairs()) == PAIRS
    assert list(reversed(store)) == PAIRS[::-1]
    assert store.index(PAIRS[4]) == 4 and store.count(PAIRS[4]) == 1


@pytest.mark.parametrize("index", [0, 6, -1, -7, np.int64(3)])
def test_indices_from_either_end(store, index):
    assert store[index] == PAIRS[index]


@pytest.mark.parametrize("index", [7, -8])
def test_an_index_outside(store, index):
    with pytest.raises(IndexError, match=f"pair {index} of 7"):
        store[index]


@pytest.mark.parametrize("index", ["1", 1.5, None])
def test_what_is_no_index(store, index):
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        store[index]


@pytest.mark.parametrize(
    "part", [slice(2, 5), slice(None), slice(-3, None), slice(None, None, -2), slice(5, 99)]
)
def test_a_slice_is_a_list_of_pairs(store, part):
    assert store[part] == PAIRS[part]


def test_membership(store):
    assert PAIRS[5] in store
    assert replace(PAIRS[5], id="another") not in store
    assert replace(PAIRS[5], chosen_score=PAIRS[5].chosen_score + 1) not in store
    assert "5" not in store


def test_an_error_of_decoding_is_not_the_end(store, monkeypatch):
    """The iteration of collections.abc would stop without a word."""

    def pair(row):
        raise IndexError("a list is shorter than it says")

    monkeypatch.setattr(store._parts[0], "pair", pair)
    with pytest.raises(IndexError, match="shorter than it says"):
        list(store)


def test_equal_pairs():
    pair = PAIRS[0]
    assert pair == replace(pair, chosen=pair.chosen.copy())
    assert pair != replace(pair, chosen_score=None)
    assert pair != replace(pair, chosen=pair.chosen[:-1])
    ids = dict(id="0", prompt=pair.prompt, chosen=pair.chosen, rejected=pair.rejected)
    assert TokenPair(**ids) == TokenPair(**ids) != ScoredPair(**ids)
