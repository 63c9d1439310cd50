"""Which tokens a rule keeps: against loops over Python numbers, at ties, thresholds and ends."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import V, random_scored_pairs, tiny_model

from sepo.data import pack
from sepo.data.segments import make_segments
from sepo.data.selection import Selection
from sepo.masks import (
    AboveQuantile,
    BelowMean,
    HighestEntropy,
    above_quantile,
    below_mean_probability,
)
from sepo.model.kept import kept_logprob
from sepo.model.prepare import prepare_model
from sepo.ops import selected_logprob

F64 = dict(dtype=torch.float64)
# responses of numbers that tie often, empty ones and single ones among them
RESPONSES = st.lists(st.lists(st.integers(-3, 3), max_size=9), min_size=1, max_size=6)


def packed(responses, dtype=torch.float64):
    values = torch.tensor([x for response in responses for x in response], dtype=dtype)
    lengths = [0, *map(len, responses)]
    return values, torch.tensor(lengths).cumsum(0).int()


def split(keep, responses):
    return [part.tolist() for part in keep.split([len(response) for response in responses])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=50, deadline=None)
@given(responses=RESPONSES)
def test_below_the_mean_by_exact_fractions(dtype, responses):
    logp, cu_rows = packed(responses, dtype)
    logp = logp - 4
    expected = []
    for part in logp.split([len(response) for response in responses]):
        p = [Fraction(x) for x in part.exp().tolist()]  # exact: the same number is the same number
        expected.append([x * len(p) < sum(p) for x in p])
    assert split(below_mean_probability(logp, cu_rows), responses) == expected


def test_the_mean_is_of_probabilities():
    """Their geometric mean, that of the logarithms, is lower: 0.3 lies between the two."""
    logp = torch.tensor([0.9, 0.3, 0.02], **F64).log()  # means 0.407 and 0.175
    assert below_mean_probability(logp, torch.tensor([0, 3])).tolist() == [False, True, True]
    assert (logp < logp.mean()).tolist() == [False, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 1000, 4097])
def test_equal_probabilities_leave_nothing(length, dtype):
    """However the mean of the same number is rounded, it is not above that number."""
    for value in (-0.1, -1 / 3, -4.0, -7.3, -60.0, -110.0):  # the last underflows
        logp = torch.full((length,), value, dtype=dtype)
        assert not below_mean_probability(logp, torch.tensor([0, length])).any()


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.6, 0.7, 0.95, 1.0])
@settings(max_examples=50, deadline=None)
@given(responses=RESPONSES)
def test_above_the_quantile_by_sorting(quantile, responses):
    score, cu_rows = packed(responses)
    expected = []
    for response in responses:
        at = -(-Fraction(str(quantile)) * (len(response) - 1) // 1)  # ceil, exactly
        threshold = sorted(response)[int(at)] if response else None
        expected.append([x >= threshold for x in response])
    assert split(above_quantile(score, cu_rows, quantile), responses) == expected


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 10, 11, 16, 31])
def test_above_the_quantile_as_released(length):
    """torch.quantile, which interpolates, and >=: the same tokens, T - ceil(0.6 (T - 1)) of them."""
    score = torch.randn(length, generator=torch.Generator().manual_seed(length), **F64)
    keep = above_quantile(score, torch.tensor([0, length]), 0.6)
    assert torch.equal(keep, score >= torch.quantile(score, 0.6))
    assert keep.sum() == length - -(-6 * (length - 1) // 10)


def test_a_policy_that_is_its_reference_keeps_all():
    """Strictly above would keep none, and then nothing would ever move."""
    logp, cu_rows = torch.randn(9), torch.tensor([0, 4, 9])
    assert AboveQuantile(0.6).keep(logp, logp.clone(), None, cu_rows).all()


def test_both_sides_keep_what_lags_behind_the_reference():
    """Chosen: what the reference finds more likely. Rejected: what it finds less likely."""
    logp, cu_rows = torch.zeros(8), torch.tensor([0, 4, 8])
    ref_logp = torch.tensor([1.0, 3.0, 2.0, 0.0, 1.0, 3.0, 2.0, 0.0])
    keep = AboveQuantile(0.6).keep(logp, ref_logp, None, cu_rows)
    assert keep.tolist() == [False, True, True, False, True, False, False, True]


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 1.0])
@settings(max_examples=50, deadline=None)
@given(responses=RESPONSES)
def test_the_highest_entropies_by_sorting(fraction, responses):
    entropy, cu_rows = packed(responses)
    expected = []
    for response in responses:
        K = min(len(response), max(1, int(Fraction(str(fraction)) * len(response))))
        highest = sorted(range(len(response)), key=lambda t: (-response[t], t))[:K]
        expected.append([t in highest for t in range(len(response))])
    keep = HighestEntropy(fraction).keep(torch.zeros_like(entropy), None, entropy, cu_rows)
    assert split(keep, responses) == expected


@pytest.mark.parametrize("rule", [BelowMean(), AboveQuantile(0.6), HighestEntropy(0.3)])
def test_what_is_no_number_is_kept(rule):
    """Else it would leave the loss, and the run would go on with it."""
    logp, ref_logp, entropy = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    cu_rows = torch.tensor([0, 5, 12])
    for at in (0, 4, 11):
        policy = torch.stack([logp, entropy])
        policy[:, at] = torch.nan
        keep = rule.keep(policy[0], ref_logp, policy[1], cu_rows)
        other = slice(5, 12) if at < 5 else slice(5)
        assert keep[at]
        assert torch.equal(keep[other], rule.keep(logp, ref_logp, entropy, cu_rows)[other])


def test_no_pairs():
    none, cu_rows = torch.empty(0), torch.zeros(1, dtype=torch.int32)
    for rule in (BelowMean(), AboveQuantile(0.6), HighestEntropy(0.3)):
        assert rule.keep(none, none, none, cu_rows).shape == (0,)


# The head on what is left


class Every:
    """Every second token, or none."""

    needs_entropy = False

    def __init__(self, start: int):
        self.start = start

    def keep(self, logp, ref_logp, entropy, cu_rows):
        assert not logp.requires_grad and entropy is None
        keep = torch.zeros(len(logp), dtype=torch.bool)
        keep[self.start :: 2] = True
        return keep


def batch():
    return pack([make_segments(pair, Selection("all")) for pair in random_scored_pairs(5)])


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
@pytest.mark.parametrize("rows", [7, 1000], ids=["recompute", "save"])
def test_gradients_of_the_kept_rows_alone(arch, rows):
    model, given = prepare_model(tiny_model(arch, **F64)), batch()
    weight = torch.randn(len(given.rows), generator=torch.Generator().manual_seed(0), **F64)
    logp, keep = kept_logprob(model, given, Every(1), None, budget=rows * V * 8)
    (logp * weight * keep).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    whole = model(batch=given)
    (whole * weight * keep).sum().backward()
    torch.testing.assert_close(logp, whole, rtol=1e-12, atol=1e-12)
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-9, atol=1e-12, msg=name)
        assert p.grad.abs().max() > 0, name


def test_nothing_kept_is_a_gradient_of_zeros():
    """Each parameter has one all the same: DDP waits for it."""
    model, given = prepare_model(tiny_model(**F64)), batch()
    logp, keep = kept_logprob(model, given, Every(10**6), None)
    assert not keep.any()
    logp.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_the_second_pass_sees_the_kept_rows_alone(monkeypatch):
    seen = []

    def spy(hidden, weight, rows, targets, **options):
        seen.append((len(rows), torch.is_grad_enabled()))
        return selected_logprob(hidden, weight, rows, targets, **options)

    monkeypatch.setattr("sepo.model.kept.selected_logprob", spy)
    model, given = prepare_model(tiny_model()), batch()
    M = len(given.rows)
    _, keep = kept_logprob(model, given, Every(0), None)
    assert seen == [(M, False), (int(keep.sum()), True)] and 2 * seen[1][0] in (M, M + 1)
    with torch.no_grad():  # an evaluation needs no second one
        logp, again = kept_logprob(model, given, Every(0), None)
    assert seen[2:] == [(M, False)] and torch.equal(again, keep) and not logp.requires_grad


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_entropies_come_with_the_first_pass(arch, monkeypatch):
    """Of the whole distribution, softcap and all, in the product that has the log-probabilities."""

    def without_a_gradient(*args, **options):
        assert torch.is_grad_enabled(), "one product more"
        return selected_logprob(*args, **options)

    monkeypatch.setattr("sepo.model.kept.selected_logprob", without_a_gradient)
    model, rule = prepare_model(tiny_model(arch, **F64)), HighestEntropy(0.4)
    _, keep = kept_logprob(model, batch(), rule, None)
    entropy = []
    for pair in random_scored_pairs(5):
        for response in (pair.chosen, pair.rejected):
            ids = torch.from_numpy(np.concatenate([pair.prompt, response])).long()
            with torch.no_grad():
                log_p = (
                    model(input_ids=ids[None]).logits[0, len(pair.prompt) - 1 : -1].log_softmax(-1)
                )
            entropy.append(-(log_p.exp() * log_p).sum(-1))
    cu_rows = torch.tensor([0, *map(len, entropy)]).cumsum(0)
    assert torch.equal(keep, rule.keep(keep, None, torch.cat(entropy), cu_rows))
