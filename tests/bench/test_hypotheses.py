"""What may explain published hours: terms by hand, fits of hours that are made of known constants."""

import numpy as np
import pytest

from sepo.cost import hypotheses as all_of
from sepo.cost import published, verdict
from sepo.cost.decoder import named
from sepo.cost.hypotheses import (
    AT_ONCE,
    EVALUATING,
    FIGURES,
    GATHERING,
    HYPOTHESES,
    LAYERS,
    POLICIES,
    Figure,
    fit,
    ranks,
)

LAYERS_8B, PAIRS = 32, 61_135


def made(hypothesis, *constants: float) -> tuple[Figure, ...]:
    """The published figures, with the hours that these constants give."""
    rows = {figure: hypothesis.row(figure) for figure in FIGURES}
    return tuple(
        figure._replace(hours=fixed + float(np.dot(rest, constants)))
        for figure, (fixed, *rest) in rows.items()
    )


def test_all_figures_are_there():
    assert (len(POLICIES), len(FIGURES)) == (48, 54)
    assert sum(figure.hours for figure in POLICIES) == pytest.approx(6980.74)
    assert np.sum([*published.TABLE_5.values()], 0) == pytest.approx((136.23, 39.87))
    assert {named(figure.shape).layers for figure in FIGURES} == {6, 12, 16, 22, 24, 32, 40}


def test_terms_are_what_a_hand_makes_of_them():
    count = named("LLaMA3-8B").parameters
    moved = PAIRS * 2 * count * 3 / 4  # 16-bit weights, three quarters of them from other GPUs
    for method, passes in (("dpo", 4), ("simpo", 3), ("sepo", 3), ("sparsepo", 4)):
        found = all_of.gathered("LLaMA3-8B", method)
        assert found == pytest.approx(passes * moved / 1e9 / 3600, rel=1e-3)
        assert all_of.layered("LLaMA3-8B", method) == passes * LAYERS_8B * PAIRS / 3600 * 1e-3
    state = PAIRS / 128 * 30 * count * 4  # four GPUs wait for it
    assert all_of.hosted("LLaMA3-8B", "dpo") == pytest.approx(state / 1e9 / 3600)
    # tokens are all that differs: the products' part is in proportion
    short = all_of.computed("LLaMA3-8B", "simpo")
    assert all_of.padded("LLaMA3-8B", "simpo") > 4096 / 620 * short


def test_shares_are_what_a_hand_makes_of_them():
    dpo, simpo, sepo = (Figure("LLaMA3-8B", name, 1.0) for name in ("dpo", "simpo", "sepo"))
    oracle = Figure("Pythia-1B", "dpo", 1.0, True)
    trained = 275 * 2 * 4  # pairs between two evaluations
    both = lambda train, forward: (trained * train + 4000 * forward) / (trained * train) / 2
    of = lambda figure: EVALUATING.share(figure, GATHERING)
    assert of(dpo) == pytest.approx(both(4, 2)) and of(simpo) == pytest.approx(both(3, 1))
    assert (of(sepo), of(oracle)) == (1 / 2, 1 / 4)
    readme, machine = (next(h for h in HYPOTHESES if h.name[0] == letter) for letter in "ij")
    # half of the weights are elsewhere instead of three quarters
    assert readme.share(oracle, GATHERING) == pytest.approx(1 / 2 * (1 / 2) / (3 / 4))
    assert readme.share(oracle, LAYERS) == 1 / 2 and readme.share(sepo, LAYERS) == 1 / 2
    assert machine.share(oracle, all_of.COMPUTED) == machine.share(oracle, LAYERS) == 1 / 4


@pytest.mark.parametrize("hypothesis", HYPOTHESES[1:], ids=lambda found: found.name[:1])
def test_a_fit_finds_the_constants_that_hours_are_made_of(hypothesis):
    constants = (0.3, 4.0)[: len(hypothesis.terms)]
    figures = made(hypothesis, *constants)
    found = fit(hypothesis, figures, figures)
    assert found.constants == pytest.approx(constants) and abs(found.errors).max() < 1e-9
    # from some, of all
    few = fit(hypothesis, figures[:20], figures)
    assert few.constants == pytest.approx(constants)


def test_pairs_at_once_are_found():
    figures = made(AT_ONCE, 0.25, 5.0)
    assert all_of.best_at_once(figures) == (2, 4)


def test_a_cost_that_would_have_to_give_hours_back_is_none():
    figures = made(AT_ONCE, 0.3, 0.0)
    less = tuple(f._replace(hours=f.hours - 0.1 * AT_ONCE.row(f)[2]) for f in figures)
    gathering, layers = fit(AT_ONCE, less, less).constants
    assert layers == 0 and 0 < gathering < 0.3


def test_no_single_cost_explains_the_figures():
    single, named_together = HYPOTHESES[1:6], (AT_ONCE, EVALUATING)
    for oracles in (False, True):
        best = min(fit(h).error(oracles=oracles) for h in single)
        assert all(fit(h).error(oracles=oracles) < best / 3 for h in named_together)


def test_parts_make_up_what_a_hypothesis_says():
    for hypothesis in (AT_ONCE, EVALUATING):
        found = fit(hypothesis)
        for figure in FIGURES[:8] + FIGURES[-2:]:
            split = verdict.by_part(figure, hypothesis)
            assert sum(split.values()) == pytest.approx(found.of(figure.model, figure.method))
            assert min(split.values()) >= 0


def test_the_oracles_own_hours_pay_back():
    """TinyLlama's SFT and DPO over what LLaMA3-8B's SePO saves: by hand."""
    (line,) = (x for x in verdict.verdict()[-1] if x.startswith("LLaMA3-8B "))
    paid = 33.71 + 9.71
    hand = f"{paid / (210 - 84.5):.2f} ({paid / (210 * (1 - 3 * 384 / (4 * 496))):.2f})"
    assert (
        hand in line and f"{paid / (128.1 - 84.5):.2f} ({paid / (128.1 * 112 / 496):.2f})" in line
    )


def test_ranks():
    assert ranks([3, 1, 3, 2]).tolist() == [2.5, 0, 2.5, 1]
    figures = made(AT_ONCE, 0.25, 5.0)
    assert fit(AT_ONCE, figures, figures).rank_correlation == pytest.approx(1)
