"""What must be equal between the methods, in value and gradient, on what a whole step computes.

The leaves are the states and the head of a policy beside another reference; `step` reads them as
the trainer does, through the fused heads.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from method_losses import (
    F64,
    arguments,
    mask_for,
    packed_loss,
    reference_of,
    scored_pairs,
    step_arguments,
    without_cache,
)
from tiny import tiny_model

from sepo.data import pack
from sepo.masks import readers
from sepo.model import frozen
from sepo.model.forward import hidden_states
from sepo.model.prepare import prepare_model
from sepo.model.reference import LiveReference
from sepo.ops import selected_logprob_kl
from sepo.trainer.methods import METHODS, TokenValues, reduce_segments
from sepo.trainer.pairs import PreparedPairs
from sepo.trainer.step import step_reads

CU_ROWS = torch.tensor([0, 3, 7, 8, 10, 15, 16], dtype=torch.int32)  # three pairs
M, V, D = 16, 11, 6
draw = lambda *shape, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed), **F64)
ONES, ZEROS = torch.ones(M, **F64), torch.zeros(M, **F64)
TARGETS = torch.arange(M) % V
ROWS = torch.arange(M, dtype=torch.int32)


def step(method, *, masks=(None, None), swapped=False, same=False, **options):
    """Losses (P,) and their gradients with respect to the policy's states and head."""
    args = arguments(method, **(dict(beta=0.3, label_smoothing=0.0, mask_l1=0.0) | options))
    hidden, head = (draw(n, D, seed=s).requires_grad_() for n, s in ((M, 0), (V, 1)))
    ref_hidden, ref_head = (hidden, head) if same else (draw(M, D, seed=2), draw(V, D, seed=3))
    direction = "ref||policy" if args.form == "released" else "policy||ref"
    values = selected_logprob_kl(
        hidden, head, ref_hidden, ref_head, ROWS, TARGETS, direction=direction
    )
    values, cu_rows = [*values, *masks], CU_ROWS
    if swapped:
        order, cu_rows = swap(CU_ROWS)
        values = [None if value is None else value[order] for value in values]
    segments = reduce_segments(TokenValues(*values), torch.ones(M), cu_rows)
    losses = METHODS[method].loss(segments, args)
    return losses.detach(), *torch.autograd.grad(losses.sum(), (hidden, head))


def swap(cu_rows):
    """The order of tokens that exchanges chosen and rejected, and its offsets."""
    bounds = list(zip(cu_rows[:-1].tolist(), cu_rows[1:].tolist(), strict=True))
    bounds = [bounds[i ^ 1] for i in range(len(bounds))]
    order = torch.cat([torch.arange(start, end) for start, end in bounds])
    lengths = torch.tensor([0, *(end - start for start, end in bounds)])
    return order, lengths.cumsum(0).int()


def assert_same(first, second, what=slice(None)):
    for a, b in zip(first[what], second[what], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert all(a.abs().max() > 1e-3 for a in first[what])


def differ(first, second):
    return (first - second).abs().max() > 1e-3


def test_sparsepo_with_masks_of_1_is_tdpo1():
    assert_same(step("sparsepo", masks=(ONES, ONES)), step("tdpo1"))
    paper = step("sparsepo", masks=(ONES, ONES), form="paper")
    assert differ(paper[0], step("tdpo1")[0])


@pytest.mark.parametrize("form", ["released", "paper"])
def test_sparsepo_without_a_kl_mask_is_dpo(form):
    assert_same(step("sparsepo", masks=(ONES, ZEROS), form=form), step("dpo"))


def test_mapo_is_sparsepo_without_l1():
    masks = draw(M, seed=4).abs(), draw(M, seed=5).abs()
    for form in ("released", "paper"):
        assert_same(step("mapo", masks=masks, form=form), step("sparsepo", masks=masks, form=form))
    dear = step("sparsepo", masks=masks, mask_l1=0.5)
    norms = [(masks[0] + masks[1])[CU_ROWS[2 * p] : CU_ROWS[2 * p + 2]].sum() for p in range(3)]
    torch.testing.assert_close(dear[0], step("mapo", masks=masks)[0] + 0.5 * torch.stack(norms))


def test_tdpo2_at_alpha_1_has_the_value_of_tdpo1_and_another_gradient():
    second, first = step("tdpo2", tdpo2_alpha=1.0), step("tdpo1")
    assert_same(second, first, slice(1))
    assert all(differ(a, b) for a, b in zip(second[1:], first[1:], strict=True))


def test_tdpo2_at_alpha_0_is_dpo():
    assert_same(step("tdpo2", tdpo2_alpha=0.0), step("dpo"))


def test_sepo_with_every_token_is_simpo():
    sepo = step("sepo", gamma=2.3, margin=0.4)
    assert_same(sepo, step("simpo", beta=2.3, gamma_beta_ratio=0.4 / 2.3))


def test_dpop_without_a_penalty_is_dpo():
    assert_same(step("dpop", dpop_lambda=0.0), step("dpo"))
    assert differ(step("dpop", dpop_lambda=0.5)[0], step("dpo")[0])


@pytest.mark.parametrize(
    "method", ["dpo", "cdpo", "tdpo1", "tdpo2", "dpop", "sparsepo", "mapo", "ipo"]
)
def test_a_policy_that_is_its_reference(method):
    options = dict(label_smoothing=0.2) if method == "cdpo" else {}
    masks = (draw(M, seed=4).abs(), draw(M, seed=5).abs())
    expected = math.log(2)
    if method == "ipo":
        expected = 1 / (4 * 0.3**2)
    for form in ("released", "paper"):
        losses, *grads = step(
            method.removeprefix("c"), masks=masks, same=True, form=form, **options
        )
        assert losses.tolist() == pytest.approx([expected] * 3, abs=1e-14)
        assert all(grad.abs().max() > 1e-3 for grad in grads)  # a start, not a standstill


@pytest.mark.parametrize("method", ["dpo", "tdpo1", "sparsepo"])
def test_swapping_the_pair_negates_the_logit(method):
    """Value and gradient of the logit: of -log sigmoid(logit) both follow from both losses."""
    masks = (draw(M, seed=4).abs(), draw(M, seed=5).abs())
    logit = lambda losses: -torch.expm1(losses).log()
    found, swapped = (step(method, masks=masks, swapped=s)[0] for s in (False, True))
    torch.testing.assert_close(logit(found), -logit(swapped), rtol=1e-12, atol=1e-13)
    # sigmoid(-logit) weighs the logit's gradient in the one loss, -sigmoid(logit) in the other
    one_pair = lambda s: (
        gradient_of_first_pair(method, masks, s)
        / -torch.expm1(-step(method, masks=masks, swapped=s)[0][0])
    )
    torch.testing.assert_close(one_pair(False), -one_pair(True), rtol=1e-11, atol=1e-12)


def gradient_of_first_pair(method, masks, swapped):
    """Of its states, which no other pair reads."""
    return step(method, masks=masks, swapped=swapped)[1][: CU_ROWS[2]]


def test_gradients_of_the_divergence():
    """Of KL(ref || policy) with respect to the policy's logits: policy - ref."""
    z, ref = draw(M, V, seed=6).requires_grad_(), draw(M, V, seed=7)
    eye = torch.eye(V, **F64)
    kl = selected_logprob_kl(z, eye, ref, eye, ROWS, TARGETS, direction="ref||policy")[2]
    (grad,) = torch.autograd.grad(kl.sum(), z)
    torch.testing.assert_close(grad, z.softmax(-1) - ref.softmax(-1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("direction", ["ref||policy", "policy||ref"])
def test_a_divergence_of_probabilities_that_underflow(direction):
    """A gap of 200 nats: softmax(x).log() says -inf, and 0 * -inf is NaN."""
    peaked, even = torch.tensor([[200.0, 0.0, 0.0, 0.0]] * 2), torch.zeros(2, 4)
    eye, rows = torch.eye(4), torch.arange(2, dtype=torch.int32)
    # against an even distribution of four the peaked one has ln 4; the other way round 3/4 of 200
    for peaked_is_first, expected in ((True, 4 * math.log(2)), (False, 2 * (150 - math.log(4)))):
        policy, ref = peaked, even
        if peaked_is_first != (direction == "policy||ref"):
            policy, ref = even, peaked
        policy = policy.clone().requires_grad_()
        kl = selected_logprob_kl(policy, eye, ref, eye, rows, rows.long(), direction=direction)[2]
        assert kl.sum().item() == pytest.approx(expected, rel=1e-6)
        kl.sum().backward()
        assert policy.grad.isfinite().all()


# What must not matter to a step


NAMES = [
    "dpo", "ipo", "rrhf", "tdpo2", "sparsepo independent", "sparsepo paper", "mapo", "sepo", "sepo-entropy", "confpo",
    "selective-dpo",
]  # fmt: skip


def per_pair(name, arch, pairs):
    """Losses of each pair, and the gradients of all parameters."""
    args = step_arguments(name)
    reference = reference_of(arch, "packed") if METHODS[args.method].reference else None
    model = tiny_model(arch, **F64)
    if METHODS[args.method].mask == "learned":
        model.sparse_mask = mask_for(reference, args)
    prepare_model(model)
    live = None if reference is None else LiveReference(prepare_model(reference))
    batch = pack([*PreparedPairs(pairs, args)])
    tokens = model(batch=batch, reads=step_reads(METHODS[args.method], args, live))
    segments = reduce_segments(tokens, batch.weights, batch.cu_rows)
    losses = METHODS[args.method].loss(segments, args)
    losses.sum().backward()
    return losses.detach(), [p.grad for p in model.parameters()]


def assert_close(found, expected):
    for a, b in zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "arch"), [*((name, "llama") for name in NAMES), ("mapo", "gpt_neox")]
)
def test_order_and_company_of_pairs(name, arch):
    pairs = without_cache(scored_pairs(2))
    whole = per_pair(name, arch, pairs)
    backwards = per_pair(name, arch, pairs[::-1])
    assert_close((backwards[0].flip(0), backwards[1]), whole)
    alone = [per_pair(name, arch, [pair]) for pair in pairs]
    total = [sum(grads) for grads in zip(*(grads for _, grads in alone), strict=True)]
    assert_close((torch.cat([losses for losses, _ in alone]), total), whole)
    assert whole[0].std() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_tokens_after_the_last_used_one(name):
    """What padding would be: ids that no weight counts."""
    pairs = without_cache(scored_pairs(7))

    def pad(pair, count):
        longer = {}
        for side in ("chosen", "rejected"):
            response = getattr(pair, side)
            longer[side] = np.concatenate([response, np.full(count, 2, np.int32)])
            longer[f"{side}_weight"] = (np.arange(len(response) + count) < len(response)).astype(
                np.float32
            )
        return replace(pair, **longer)

    assert_close(
        per_pair(name, "llama", [pad(pair, 3) for pair in pairs]),
        per_pair(name, "llama", [pad(pair, 0) for pair in pairs]),
    )


@pytest.mark.parametrize("name", NAMES)
def test_noise_in_rows_that_predict_nothing(name, monkeypatch):
    """States of the prompt but its last, of either model, are read by attention alone."""
    pairs = without_cache(scored_pairs(7))
    expected = per_pair(name, "llama", pairs)
    noisy = []

    def with_noise(model, batch, **how):
        hidden = hidden_states(model, batch, **how)
        if how.get("layout") is not None:  # the comparison of `prepare_model`
            return hidden
        unread = torch.ones(len(hidden), 1, dtype=torch.bool)
        unread[batch.rows] = False
        noisy.append(int(unread.sum()))
        return hidden + unread * 1e3 * draw(*hidden.shape, seed=8)

    for module in ("sepo.model.forward", "sepo.model.kept", frozen.__name__, readers.__name__):
        monkeypatch.setattr(f"{module}.hidden_states", with_noise)
    found = per_pair(name, "llama", pairs)
    assert_close(found, expected)
    assert len(noisy) == 1 + (METHODS[step_arguments(name).method].reference is not None)
    assert min(noisy) > 10


def test_sepo_on_all_tokens_of_a_model_is_simpo():
    found = [
        packed_loss(tiny_model(**F64), None, scored_pairs(3), args).item()
        for args in (
            arguments("sepo", fraction=1.0, gamma=2.3, margin=0.4),
            arguments("simpo", beta=2.3, gamma_beta_ratio=0.4 / 2.3),
        )
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-12)
