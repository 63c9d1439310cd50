"""The whole path on real architectures: packed, truncated, shared and fused equals dense, masked
and naive, in loss and in every parameter gradient.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dense import dense_token_logprob
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recorder import Recorder
from tiny import CONFIGS, V, random_scored_pairs, tiny_model

from sepo.data import ScoredPair, pack, random_positions
from sepo.data.segments import make_segments
from sepo.losses import dpo_loss, sepo_loss, simpo_loss
from sepo.methods import METHODS, reduce_segments
from sepo.model import prepare_model

ARGS = SimpleNamespace(
    gamma=2.0, margin=0.5, beta=0.7, gamma_beta_ratio=0.5, label_smoothing=0.1, seed=5
)


def scored_pairs(seed: int) -> list[ScoredPair]:
    """One to four pairs; whole-numbered scores, so that ties are common."""
    return random_scored_pairs(1 + seed % 4, seed=seed, longest=9, ties=True)


def packed_loss(model, pairs, method, fraction):
    """What the trainer computes for one micro-batch."""
    prepare_model(model)
    how = METHODS[method].positions
    batch = pack([make_segments(p, how, fraction=fraction, seed=ARGS.seed) for p in pairs])
    logp = model(batch=batch)
    segments = reduce_segments(logp, batch.weights, batch.ref_logp, batch.cu_rows)
    return METHODS[method].loss(segments, ARGS).sum()


def dense_loss(model, pairs, method, fraction):
    """The definition: METHODS by hand, one sequence at a time."""
    values = []
    for pair in pairs:
        for side, sign in (("chosen", -1), ("rejected", 1)):
            response = getattr(pair, side)
            logp = dense_token_logprob(model, pair.prompt, response)
            T = len(response)
            K = max(1, int(fraction * T + 1e-9))
            if method == "sepo":
                score = getattr(pair, f"{side}_score")
                used = sorted(range(T), key=lambda t: (sign * score[t], t))[:K]
            elif method == "sepo-rand":
                used = random_positions(T, fraction, seed=ARGS.seed, key=f"{pair.id}/{side}")
            else:
                used = np.arange(T)
            mask = torch.zeros(T, dtype=logp.dtype)
            mask[torch.as_tensor(np.array(used)).long()] = 1
            if method == "dpo":
                ref = torch.from_numpy(getattr(pair, f"{side}_ref_logp"))
                values.append((logp - ref).sum())
            elif method == "sft":
                values.append(logp.sum())
            else:
                values.append((logp * mask).sum() / mask.sum())
    values = torch.stack(values)
    if method == "dpo":
        return dpo_loss(values, beta=ARGS.beta, label_smoothing=ARGS.label_smoothing).sum()
    if method == "simpo":
        margin = ARGS.beta * ARGS.gamma_beta_ratio
        return simpo_loss(values, beta=ARGS.beta, margin=margin).sum()
    if method == "sft":
        return -values[0::2].sum()
    return sepo_loss(values, gamma=ARGS.gamma, margin=ARGS.margin).sum()


def loss_and_gradients(compute, arch, *args):
    model = tiny_model(arch, dtype=torch.float64)
    loss = compute(model, *args)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_pipeline_is_the_method(arch, seed, method, fraction):
    args = (arch, scored_pairs(seed), method, fraction)
    packed, packed_grads = loss_and_gradients(packed_loss, *args)
    dense, dense_grads = loss_and_gradients(dense_loss, *args)
    torch.testing.assert_close(packed, dense, rtol=1e-10, atol=1e-10)
    for name, expected in dense_grads.items():
        found = packed_grads[name]
        expected = torch.zeros_like(found) if expected is None else expected
        torch.testing.assert_close(
            found, expected, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("arch", sorted(CONFIGS))
@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 10_000), fraction=st.sampled_from([0.1, 0.3, 0.5, 1.0]))
def test_packed_equals_dense(arch, method, seed, fraction):
    assert_pipeline_is_the_method(arch, seed, method, fraction)


@pytest.mark.parametrize("rows", [7, 1000], ids=["recompute", "save"])
@pytest.mark.parametrize("arch", sorted(CONFIGS))
def test_no_logits_in_a_whole_step(arch, rows):
    """Forward and backward of the model: nothing V wide is larger than the budget."""
    budget = rows * V * 4
    model = prepare_model(tiny_model(arch))
    pairs = random_scored_pairs(20)
    batch = pack([make_segments(pair, "all") for pair in pairs])
    N, M = len(batch.tokens), len(batch.rows)
    assert (M > rows) == (rows == 7), "neither schedule is tested by accident"
    with Recorder() as recorder:
        model(batch=batch, budget=budget).sum().backward()
    weights = {tuple(p.shape) for p in model.parameters()}
    weights |= {shape[::-1] for shape in weights}
    logits = [
        (shape, size) for shape, size in recorder.made if V in shape[1:] and shape not in weights
    ]
    assert logits, "the recorder did not see inside the operator"
    assert max(size for _, size in logits) <= budget
    assert all(shape[0] != N for shape, _ in logits)
