"""Faults of released code, each of which a user met as NaN, as a silent loss, or never."""

import numpy as np
import pytest
import torch
from method_losses import (
    arguments,
    assert_equal,
    dense_loss_sum,
    loss_and_gradients,
    mask_for,
    packed_loss,
    reference_of,
    scored_pairs,
    without_cache,
)
from tiny import random_scored_pairs
from tiny_trainer import PAIRS, bare, make_trainer, weights

from sepo.data import ScoredPair, TokenPair
from sepo.trainer.methods import METHODS

MASKED = sorted(name for name, method in METHODS.items() if method.mask)
WITH_KL = sorted(name for name, method in METHODS.items() if method.direction)
# masked methods have two forms
both_forms = lambda names: [
    (n, f) for n in names for f in ("released", "paper")[: 1 + (n in MASKED)]
]
ids = lambda *tokens: np.array(tokens, np.int32)


def one_token_pairs():
    """The shortest responses there are, alone and beside a longer one."""
    sides = [(ids(3), ids(4)), (ids(5), ids(6, 7, 8)), (ids(9, 10, 11), ids(12))]
    score = lambda response: np.arange(len(response), dtype=np.float32)
    return [
        ScoredPair(
            id=str(i),
            prompt=ids(1, 2),
            chosen=chosen,
            rejected=rejected,
            chosen_score=score(chosen),
            rejected_score=score(rejected),
        )
        for i, (chosen, rejected) in enumerate(sides)
    ]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_responses_of_one_token(name):
    """Their only token is predicted by the prompt's last row, which both responses share.

    Released code divides by a length of 0, normalises one number by its deviation, or leaves the
    first token after a shared prefix out of the loss.
    """
    args, pairs = arguments(name, mask_l1=0.03), one_token_pairs()
    references = {reader: reference_of("llama", reader) for reader in ("packed", "dense")}
    if METHODS[name].reference is None:
        references = dict.fromkeys(references)
    mask = None
    if METHODS[name].mask == "learned":
        mask = lambda: mask_for(references["packed"], args)
    run = lambda compute, reader: loss_and_gradients(
        compute, "llama", references[reader], pairs, args, mask=mask
    )
    expected = run(dense_loss_sum, "dense")
    assert_equal(run(packed_loss, "packed"), expected)
    assert expected[0].isfinite()
    largest = expected[1]["model.embed_tokens.weight"].abs().max()
    assert largest == 0 if name == "confpo" else largest > 1e-4  # which leaves such pairs out


@pytest.mark.parametrize("norm", ["minmax", "zscore"])
def test_one_token_responses_under_mapo(tmp_path, norm):
    trainer = make_trainer(
        tmp_path, pairs=one_token_pairs(), eval_pairs=None, method="mapo", mask_norm=norm,
        warmup_steps=0,
    )  # fmt: skip
    trainer.train()
    assert np.isfinite(trainer.state.log_history[0]["loss"])
    assert all(w.isfinite().all() for w in weights(trainer).values())


@pytest.mark.parametrize(("name", "form"), both_forms(WITH_KL))
def test_probabilities_that_underflow(tmp_path, name, form):
    """softmax(x).log() is -inf where a logit is 104 below the largest, and -inf * 0 is NaN."""
    trainer = make_trainer(
        tmp_path, arch="qwen2", method=name, form=form, warmup_steps=0, beta=1e-3,
        learning_rate=0.1, pairs=bare(PAIRS[:5]), eval_pairs=None,
    )  # fmt: skip
    for model in (trainer.model, trainer.reference.model):
        with torch.no_grad():  # now: logits so far apart are more than rounding allows for above
            model.lm_head.weight *= 300
            underflow = _softmax(model) == 0
        assert underflow.double().mean() > 0.2
    before = weights(trainer)
    trainer.train()
    metrics = trainer.state.log_history[0]
    assert all(np.isfinite(value) for value in metrics.values()), metrics
    assert metrics["kl"] > 10
    for parameter, found in weights(trainer).items():
        assert found.isfinite().all(), parameter
        assert not torch.equal(found, before[parameter]), parameter


def _softmax(model):
    hidden = model.model.embed_tokens.weight[:8]
    return model.lm_head(model.model.norm(hidden)).softmax(-1)


def test_tdpo2_is_not_tdpo1(tmp_path):
    """At alpha = 1 both have the same loss, so that only what they train tells them apart."""
    made = {}
    for name in ("tdpo1", "tdpo2"):
        made[name] = make_trainer(
            tmp_path, dtype=torch.float64, method=name, tdpo2_alpha=1.0, beta=0.5, warmup_steps=0,
            pairs_per_step=len(PAIRS),
        )  # fmt: skip
        made[name].train()
    first, second = (trainer.state.log_history[0] for trainer in made.values())
    assert first["loss"] == second["loss"] and first["kl"] == second["kl"]
    one, two = (weights(trainer) for trainer in made.values())
    assert all((one[p] - two[p]).abs().max() > 1e-5 for p in one)


def test_rrhf_divides_by_a_responses_own_length():
    """Whatever is longest in its batch: the score of a short response is not diluted."""
    args = arguments("rrhf", sft_weight=0.0)
    short = TokenPair(id="0", prompt=ids(1, 2), chosen=ids(3, 4), rejected=ids(5, 6, 7))
    padded = TokenPair(id="1", prompt=ids(1), chosen=ids(*range(2, 42)), rejected=ids(3))
    alone, beside = (
        loss_and_gradients(packed_loss, "llama", None, pairs, args)[0]
        for pairs in ([short], [short, padded])
    )
    of_padded = loss_and_gradients(packed_loss, "llama", None, [padded], args)[0]
    torch.testing.assert_close(beside, alone + of_padded, rtol=1e-12, atol=1e-12)
    expected = loss_and_gradients(dense_loss_sum, "llama", None, [short], args)[0]
    torch.testing.assert_close(alone, expected, rtol=1e-10, atol=1e-10)
    swapped = TokenPair(id="0", prompt=ids(1, 2), chosen=ids(5, 6, 7), rejected=ids(3, 4))
    other = loss_and_gradients(packed_loss, "llama", None, [swapped], args)[0]
    assert max(alone, other) > 0.01 and min(alone, other) == 0


@pytest.mark.parametrize("name", ["rrhf", "sparsepo"])
def test_a_step_leaves_the_data_as_it_was(tmp_path, name):
    """RRHF's labels are overwritten in place, so that its second epoch trains on others."""
    pairs = random_scored_pairs(6)
    before = [
        {n: getattr(p, n).copy() for n in ("prompt", "chosen", "rejected", "chosen_score")}
        for p in pairs
    ]
    make_trainer(tmp_path, pairs=pairs, eval_pairs=None, method=name).train()
    for pair, kept in zip(pairs, before, strict=True):
        for field, expected in kept.items():
            assert np.array_equal(getattr(pair, field), expected), field


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_ipo_is_normalised_by_length_on_the_packed_path(reduce):
    """A pair of long responses in company of short ones: the margin is nats a token, or nats."""
    args = arguments("ipo", ipo_reduce=reduce)
    pairs = without_cache(scored_pairs(3))
    lengths = {len(getattr(p, side)) for p in pairs for side in ("chosen", "rejected")}
    assert len(lengths) > 3
    found = loss_and_gradients(packed_loss, "llama", reference_of("llama", "packed"), pairs, args)
    dense = loss_and_gradients(dense_loss_sum, "llama", reference_of("llama", "dense"), pairs, args)
    assert_equal(found, dense)


# Metrics that say something else than the loss

log_sigmoid = lambda x: -np.logaddexp(0, -x)
FROM_MARGIN = {
    "dpo": lambda m, a: -log_sigmoid(m),
    "selective-dpo": lambda m, a: -log_sigmoid(m),
    "dpop": lambda m, a: -log_sigmoid(m),
    "tdpo1": lambda m, a: -log_sigmoid(m),
    "tdpo2": lambda m, a: -log_sigmoid(m),
    "sparsepo": lambda m, a: -log_sigmoid(m),
    "mapo": lambda m, a: -log_sigmoid(m),
    "simpo": lambda m, a: -log_sigmoid(m - a.beta * a.gamma_beta_ratio),
    "confpo": lambda m, a: -log_sigmoid(m - a.beta * a.gamma_beta_ratio),
    "sepo": lambda m, a: -log_sigmoid(m - a.margin),
    "sepo-rand": lambda m, a: -log_sigmoid(m - a.margin),
    "sepo-entropy": lambda m, a: -log_sigmoid(m - a.margin),
    "ipo": lambda m, a: (m / a.beta - 1 / (2 * a.beta)) ** 2,
    "rrhf": lambda m, a: max(0.0, -m),
}


def test_every_method_with_rewards_is_compared():
    assert FROM_MARGIN.keys() == {name for name, m in METHODS.items() if m.reward is not None}


@pytest.mark.parametrize(("name", "form"), both_forms(FROM_MARGIN))
def test_the_margin_that_is_logged_is_the_losss(tmp_path, name, form):
    """One pair an evaluation, so that the mean of a function is the function of the mean."""
    made = make_trainer(
        tmp_path, dtype=torch.float64, method=name, mask_l1=0.0, sft_weight=0.0, form=form,
        beta=0.4, dpop_lambda=3.0, pairs=PAIRS, eval_pairs=None,
    )  # fmt: skip
    if made.mask is not None:
        made.mask.load_state_dict(mask_for(made.reference.model, made.args).state_dict())
    margins = []
    for pair in PAIRS[:3]:
        metrics = made.evaluate([pair])
        margin = metrics["eval_rewards/margins"]
        assert metrics["eval_loss"] == pytest.approx(FROM_MARGIN[name](margin, made.args), abs=1e-9)
        chosen, rejected = metrics["eval_rewards/chosen"], metrics["eval_rewards/rejected"]
        assert margin == pytest.approx(chosen - rejected, abs=1e-12)
        assert metrics["eval_rewards/accuracies"] == (margin > 0)
        margins.append(margin)
    assert np.std(margins) > 1e-3
