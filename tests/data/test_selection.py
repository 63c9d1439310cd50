"""What is selected reaches every method: counts, the user's own weights, draws, a run's identity."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import random_scored_pairs
from torch import nn

from sepo.data import TokenPair, pack
from sepo.data.segments import make_segments
from sepo.data.selection import Selection
from sepo.train import parse
from sepo.trainer.config import SePOConfig
from sepo.trainer.identity import describe_run
from sepo.trainer.methods import METHODS, TokenValues, reduce_segments
from sepo.trainer.pairs import PreparedPairs

PAIRS = random_scored_pairs(20)


def config(**args) -> SePOConfig:
    return SePOConfig(output_dir="unused", use_cpu=True, **args)


def prepared(pairs=PAIRS, **args) -> PreparedPairs:
    return PreparedPairs(pairs, config(**args))


def positions(pairs: PreparedPairs, index: int) -> list[list[int]]:
    return [segment.positions.tolist() for segment in pairs[index][1:]]


def test_counts_follow_the_scores():
    args = dict(select="mass", rejected_fraction=0.5, mass=0.6)
    made = prepared(**args)
    for i, pair in enumerate(PAIRS):
        prompt, chosen, rejected = made[i]
        gain = np.sort(np.maximum(pair.chosen_score, 0).astype(float))[::-1]
        needed = np.flatnonzero(np.cumsum(gain) >= 0.6 * gain.sum())[0] + 1
        assert len(chosen.positions) == needed
        assert len(rejected.positions) == max(1, len(pair.rejected) // 2)
        read = chosen.positions[-1], rejected.positions[-1]
        assert made.parts[i].tolist() == [len(prompt), *read]
        assert made.selected[i] == needed + len(rejected.positions)
    shares = made.selected / [len(p.chosen) + len(p.rejected) for p in PAIRS]
    assert len(np.unique(shares)) > 5  # no fixed share of the tokens


def test_official_selection_reaches_the_pairs():
    made = prepared(fraction=1.0, first_token="released")
    for i, pair in enumerate(PAIRS):
        for found, response in zip(positions(made, i), (pair.chosen, pair.rejected), strict=True):
            assert found == [*range(min(1, len(response) - 1), len(response))]


def test_sepo_rand_draws_for_a_row_whatever_rows_are_beside_it():
    args = dict(method="sepo-rand", fraction=0.4, seed=3)
    made = prepared(**args)
    expected = {pair.id: positions(made, i) for i, pair in enumerate(PAIRS)}
    some = PAIRS[::-3]
    again = prepared(some, **args, pairs_per_step=2, max_tokens_per_batch=99)
    assert {pair.id: positions(again, i) for i, pair in enumerate(some)} == {
        pair.id: expected[pair.id] for pair in some
    }
    other = prepared(**(args | dict(seed=4)))
    assert {pair.id: positions(other, i) for i, pair in enumerate(PAIRS)} != expected


def test_a_mask_is_drawn_for_sparsepo_alone_and_if_asked():
    for method in METHODS:
        made = prepared(method=method, mask="random")
        assert (made[0][1].mask is not None) == (method == "sparsepo"), method
    assert prepared(method="sparsepo")[0][1].mask is None


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"sepo-rand"}))
def test_the_users_weights_mean_the_same_whether_zeros_are_read_or_left_out(method):
    """Tokens of weight zero are never gathered; the loss must be the one of reading them."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, 9, (6, 2))
    ids = iter(range(sizes.sum()))  # every token another one, so that a target names its values
    args, whole, cut = config(method=method), [], []
    for i, (m, n) in enumerate(sizes.tolist()):
        tokens = dict(chosen=[next(ids) for _ in range(m)], rejected=[next(ids) for _ in range(n)])
        weights = {
            f"{side}_weight": np.maximum(rng.normal(0.3, 1, len(y)), 0).astype("f4")
            for side, y in tokens.items()
        }
        for weight in weights.values():
            weight[rng.integers(len(weight))] = 0.5  # one at least
        arrays = {side: np.array(y, np.int32) for side, y in tokens.items()}
        pair = TokenPair(id=str(i), prompt=np.zeros(1, np.int32), **arrays, **weights)
        side = "chosen" if METHODS[method].positions == "chosen" else "all"
        ones = {name: np.ones_like(weight) for name, weight in weights.items()}
        plain = make_segments(replace(pair, **ones), Selection(side))
        for segment, name in zip(plain[1:], weights, strict=True):
            segment.weights[:] = weights[name][segment.positions]
        whole.append(plain)
        cut.append(make_segments(pair, Selection(METHODS[method].positions)))
    values = torch.randn(5, int(sizes.sum()), dtype=torch.float64)

    def loss(batch):
        logp, ref_logp, kl, *masks = values[:, batch.targets]
        given = TokenValues(logp, ref_logp, kl.abs(), *(mask.abs() for mask in masks))
        return METHODS[method].loss(reduce_segments(given, batch.weights, batch.cu_rows), args)

    read, left_out = pack(whole), pack(cut)
    assert len(left_out.rows) < len(read.rows)
    torch.testing.assert_close(loss(left_out), loss(read), rtol=1e-12, atol=1e-12)


def test_a_run_is_another_one_with_another_selection():
    def what(**args):
        pairs = PreparedPairs(random_scored_pairs(2), config(**args))
        run = describe_run(nn.Linear(1, 1), config(**args), pairs)
        return {k: run[k] for k in ("fraction", "rejected_fraction", "mass", "first_token")}

    plain = dict(fraction=0.3, rejected_fraction=None, mass=None, first_token="paper")
    assert what() == what(mass=0.5) == plain  # a share that nothing asks for
    assert what(select="mass", mass=0.5) == plain | dict(fraction="mass", mass=0.5)
    by_side = what(rejected_select="mass", first_token="released")
    assert by_side == plain | dict(rejected_fraction="mass", mass=0.8, first_token="released")
    assert what(method="simpo", select="mass", first_token="released") == dict.fromkeys(plain)


def test_the_commands_of_the_page_parse():
    page = (Path(__file__).parents[2] / "docs" / "selection.md").read_text()
    commands = [line.split()[2:] for line in page.splitlines() if line.startswith("sepo train ")]
    assert len(commands) == 9
    for command in commands:
        given = ["--model_name_or_path", "M", "--output_dir", "unused", "--use_cpu", *command]
        assert parse(given).dataset_name
