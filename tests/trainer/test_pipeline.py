"""The whole path on real architectures: packed, truncated, shared and fused equals dense, masked
and naive, in loss and in every parameter gradient.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from method_losses import (
    F64,
    REFERENCE_ARCH,
    STEPS,
    arguments,
    assert_equal,
    dense_loss_sum,
    loss_and_gradients,
    mask_for,
    packed_loss,
    reference_of,
    scored_pairs,
    step_arguments,
    without_cache,
)
from recorder import Recorder
from tiny import CONFIGS, V, random_scored_pairs, tiny_model

from sepo.data import ScoredPair, pack
from sepo.data.segments import make_segments
from sepo.data.selection import Selection
from sepo.model.prepare import prepare_model
from sepo.model.reads import Reads
from sepo.model.reference import LiveReference
from sepo.trainer.methods import METHODS
from sepo.trainer.pairs import PreparedPairs
from sepo.trainer.step import step_reads

# or with one in the pairs
WITHOUT_REFERENCE = [
    "confpo", "dpo", "selective-dpo", "sepo", "sepo-entropy", "sepo-rand", "sft", "simpo",
]  # fmt: skip


@pytest.mark.parametrize("method", WITHOUT_REFERENCE)
@pytest.mark.parametrize("arch", sorted(CONFIGS))
@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 10_000), fraction=st.sampled_from([0.1, 0.3, 0.5, 1.0]))
def test_packed_equals_dense(arch, method, seed, fraction):
    args = scored_pairs(seed), arguments(method, fraction=fraction)
    found = loss_and_gradients(packed_loss, arch, None, *args)
    assert_equal(found, loss_and_gradients(dense_loss_sum, arch, None, *args))


def weighted(pairs: list[ScoredPair]) -> list[ScoredPair]:
    """With the user's weights, nothing at all on some tokens."""
    rng = np.random.default_rng(0)

    def draw(tokens):
        weight = rng.choice([0, 0.5, 2], len(tokens)).astype(np.float32)
        weight[rng.integers(len(tokens))] = 2
        return weight

    sides = ("chosen", "rejected")
    return [
        replace(pair, **{f"{side}_weight": draw(getattr(pair, side)) for side in sides})
        for pair in pairs
    ]


CASES = [(arch, name, False) for arch in sorted(REFERENCE_ARCH) for name in STEPS]
# weights leave nothing to draw at random, and are not the architecture's business
CASES += [("llama", name, True) for name in STEPS if name != "sepo-rand"]


@pytest.mark.parametrize(("arch", "name", "weights"), CASES)
def test_a_step_equals_the_formula(arch, name, weights):
    """Together in one buffer and a pair at a time, with a live reference of another width."""
    args = step_arguments(name)
    method, reference, mask = METHODS[args.method], dict.fromkeys(("packed", "dense")), None
    if method.reference:
        reference = {reader: reference_of(arch, reader) for reader in reference}
    if method.mask == "learned" and args.mask_kind != "random":
        mask = partial(mask_for, reference["dense"], args)
    pairs = without_cache(scored_pairs(2))
    pairs = weighted(pairs) if weights else pairs
    run = lambda compute, reader, **how: loss_and_gradients(
        compute, arch, reference[reader], pairs, args, mask=mask, **how
    )
    expected = run(dense_loss_sum, "dense")
    assert_equal(run(packed_loss, "packed"), expected)
    assert_equal(run(packed_loss, "packed", together=False), expected)
    of_mask = [grad for name, grad in expected[1].items() if "sparse_mask" in name]
    assert len(of_mask) == (0 if mask is None else len([*mask().parameters()]))
    assert all(grad.abs().max() > 1e-6 for grad in of_mask)


@pytest.mark.parametrize("arch", sorted(REFERENCE_ARCH))
@pytest.mark.parametrize("name", ["sparsepo", "sparsepo binary", "mapo", "mapo zscore"])
def test_the_masks_of_these_steps_differ_from_token_to_token(arch, name):
    """Or a mask that is read wrongly would be the same."""
    args, model = step_arguments(name), prepare_model(tiny_model(arch, **F64))
    reference = prepare_model(reference_of(arch, "packed"))
    model.sparse_mask = mask_for(reference, args)
    batch = pack([*PreparedPairs(scored_pairs(3), args)])
    reads = step_reads(METHODS[args.method], args, LiveReference(reference))
    values = model(batch=batch, reads=reads)
    for mask in (values.reward_mask, values.kl_mask):
        assert mask.std() > 0.1
        if args.method == "sparsepo":
            assert 0.1 < (mask == 0).double().mean() < 0.9


@pytest.mark.parametrize("rows", [7, 1000], ids=["recompute", "save"])
@pytest.mark.parametrize("arch", sorted(CONFIGS))
def test_no_logits_in_a_whole_step(arch, rows):
    """Forward and backward of the model: nothing V wide is larger than the budget."""
    budget = rows * V * 4
    model = prepare_model(tiny_model(arch))
    pairs = random_scored_pairs(20)
    batch = pack([make_segments(pair, Selection("all")) for pair in pairs])
    N, M = len(batch.tokens), len(batch.rows)
    assert (M > rows) == (rows == 7), "neither schedule is tested by accident"
    with Recorder() as recorder:
        model(batch=batch, reads=Reads(budget=budget)).logp.sum().backward()
    weights = {tuple(p.shape) for p in model.parameters()}
    weights |= {shape[::-1] for shape in weights}
    logits = [
        (shape, size) for shape, size in recorder.made if V in shape[1:] and shape not in weights
    ]
    assert logits, "the recorder did not see inside the operator"
    assert max(size for _, size in logits) <= budget
    assert all(shape[0] != N for shape, _ in logits)
