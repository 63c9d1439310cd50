from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from placing import any_text, check_nasty, check_pair
from transferred_stores import scored
from vocabularies import NASTY, REAL, table

from sepo.data.read.read import read_pairs
from sepo.data.read.render import spans
from sepo.data.selection import select_positions
from sepo.transfer.row import RowAligner
from sepo.transfer.store import read_preferences

PAIRS = Path(__file__).parents[2] / "python/sepo/demo/data/pairs.jsonl"


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("text", NASTY)
def test_bounds_are_where_decoding_says(name, text):
    check_nasty(name, text)


@pytest.mark.parametrize("source, target", [*permutations(REAL, 2)])
@any_text(examples=8)
def test_any_text_between_real_ones(source, target, response, seed):
    check_pair(source, target, response, seed)


@pytest.mark.parametrize("other", ["Mistral", "Tekken"])
def test_there_and_back_selects_the_same_bytes(other):
    data, how = str(PAIRS), dict(limit=100)
    texts = list(read_preferences(data, **how))
    first = scored(read_pairs(data, REAL["SmolLM2"](), **how).pairs)
    there = carry_pairs(
        "SmolLM2", other, first, read_pairs(data, REAL[other](), **how).pairs, texts
    )
    back = carry_pairs(other, "SmolLM2", there, first, texts)
    same = total = 0
    for one, two in zip(first, back, strict=True):
        for side, best in (("chosen", "highest"), ("rejected", "lowest")):
            lengths = table("SmolLM2").lengths(getattr(one, side))
            selected = [
                select_positions(getattr(p, f"{side}_score"), 0.3, best) for p in (one, two)
            ]
            total += lengths[selected[0]].sum()
            same += lengths[np.intersect1d(*selected)].sum()
    assert same / total > 0.95


def carry_pairs(source, target, scored, targets, texts):
    options = dict(is_same=False, mode="score", aggregate="mean", fraction=0.3)
    carry = RowAligner(table(source), table(target), **options)
    read = [(spans(text, REAL[source]()), spans(text, REAL[target]())) for text in texts]
    return [carry(*row, Counter()) for row in zip(scored, targets, read, strict=True)]
