from statistics import fmean, stdev

import numpy as np
import pytest
import torch
from tiny import V, tiny_model

from sepo.data.types import TokenPair
from sepo.demo.evaluate import (
    Estimate,
    chosen_wins,
    clustered_mean,
    kl_per_token,
    mean_sentiment,
    pair_accuracy,
    response_logp,
    token_kl,
)
from sepo.demo.sample import Completion


def random_sequences(count: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    draw = np.random.default_rng(seed)
    ids = lambda low, high: draw.integers(2, V, draw.integers(low, high)).tolist()
    return [(ids(1, 6), ids(1, 9)) for _ in range(count)]


def dense_log_softmax(model, prompt, response):
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0].double()
    return logits.log_softmax(-1)[len(prompt) - 1 : -1]  # (T, V)


def test_samples_of_one_cluster_count_once():
    values, clusters = [1.0, 1.0, 1.0, 0.0, 0.5], [4, 4, 4, 7, 2]
    found = clustered_mean(values, clusters)
    half = 1.959964 * stdev([1.0, 0.0, 0.5]) / 3**0.5
    assert found.mean == pytest.approx(0.5)
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half))
    # each value five times over is no more evidence
    assert clustered_mean(values * 5, clusters * 5).low == pytest.approx(found.low)


def test_interval_covers_the_mean_nineteen_times_in_twenty():
    draw = np.random.default_rng(0)
    hits, runs, openings, per = 0, 400, 40, 4
    for _ in range(runs):
        values = draw.normal(0, 1, (openings, 1)) + draw.normal(0, 1, (openings, per))
        found = clustered_mean(values.ravel().tolist(), np.repeat(range(openings), per).tolist())
        hits += found.low <= 0 <= found.high
    assert 0.92 <= hits / runs <= 0.97


def test_one_cluster_has_no_interval():
    with pytest.raises(ValueError, match="at least 2 clusters, got 1"):
        clustered_mean([1.0, 2.0], [0, 0])


def test_above_means_the_intervals_do_not_touch():
    low, high = Estimate(0.0, -0.1, 0.1), Estimate(0.3, 0.2, 0.4)
    assert high.above(low) and not low.above(high)
    assert not Estimate(0.3, 0.1, 0.5).above(low)
    assert str(high) == "0.300 ± 0.100"


def test_mean_sentiment_is_over_openings():
    texts = [(0, " great"), (0, " great"), (0, " great"), (1, " terrible")]
    found = mean_sentiment([Completion(i, [2], [3], text) for i, text in texts])
    one_each = mean_sentiment([Completion(i, [2], [3], text) for i, text in texts[2:]])
    assert found.mean == pytest.approx(one_each.mean) and -1 < found.mean < 1


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_response_logp_is_the_models_own(batch_size):
    model, sequences = tiny_model("llama"), random_sequences(11)
    for (prompt, response), found in zip(
        sequences, response_logp(model, sequences, batch_size=batch_size), strict=True
    ):
        expected = dense_log_softmax(model, prompt, response)
        expected = expected.gather(1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


def test_kl_is_the_whole_distributions():
    policy, reference = tiny_model("llama"), tiny_model("llama", seed=1)
    sequences = random_sequences(9)
    completions = [Completion(i // 3, *ids, "") for i, ids in enumerate(sequences)]
    found = kl_per_token(policy, reference, completions, per_opening=2, batch_size=4)
    means = []
    for opening in range(3):
        terms = []
        for prompt, response in sequences[3 * opening : 3 * opening + 2]:
            log_p = dense_log_softmax(policy, prompt, response)
            log_q = dense_log_softmax(reference, prompt, response)
            terms += (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
        means.append(fmean(terms))
    assert found.mean == pytest.approx(fmean(means), rel=1e-5)
    assert found.mean > 0.1
    assert found.low == pytest.approx(fmean(means) - 1.959964 * stdev(means) / 3**0.5, rel=1e-4)


def test_kl_of_each_token_comes_in_the_order_given():
    policy, reference = tiny_model("llama"), tiny_model("llama", seed=1)
    sequences = random_sequences(7, seed=5)
    completions = [Completion(0, *ids, "") for ids in sequences]
    found = token_kl(policy, reference, completions, batch_size=3)
    for (prompt, response), kl in zip(sequences, found, strict=True):
        log_p, log_q = (dense_log_softmax(m, prompt, response) for m in (policy, reference))
        expected = (log_p.exp() * (log_p - log_q)).sum(-1)
        torch.testing.assert_close(kl, expected.float(), rtol=1e-4, atol=1e-5)


def test_kl_to_itself_is_zero():
    model = tiny_model("llama")
    completions = [Completion(i, *ids, "") for i, ids in enumerate(random_sequences(4))]
    assert kl_per_token(model, model, completions).mean == pytest.approx(0, abs=1e-6)


def test_accuracy_compares_means_per_token():
    model = tiny_model("llama")
    sequences = random_sequences(20, seed=3)
    mean = [logp.mean().item() for logp in response_logp(model, sequences)]
    array = lambda ids: np.array(ids, np.int32)
    pairs, expected = [], []
    for number in range(10):
        prompt, chosen = sequences[2 * number]
        _, rejected = sequences[2 * number + 1]
        pairs.append(
            TokenPair(
                id=str(number), prompt=array(prompt), chosen=array(chosen), rejected=array(rejected)
            )
        )
        other = response_logp(model, [(prompt, rejected)])[0].mean().item()
        expected.append(mean[2 * number] > other)
    found = pair_accuracy(model, pairs, batch_size=7)
    assert found.mean == pytest.approx(fmean(expected)) and 0 < found.mean < 1


def test_chosen_wins_by_its_mean_not_its_sum():
    chosen = [np.float32([-1, -1, -1]), np.float32([-3]), np.float32([-1, -1.5])]
    rejected = [np.float32([-2]), np.float32([-1, -1]), np.float32([-1, -2])]
    assert chosen_wins(chosen, rejected).mean == pytest.approx(2 / 3)


def test_the_trunk_in_bfloat16_leaves_the_head_in_float32():
    model, sequences, seen = tiny_model("llama"), random_sequences(6), set()
    model.lm_head.register_forward_hook(
        lambda _, given, made: seen.add((given[0].dtype, made.dtype, made.requires_grad))
    )
    exact = torch.cat(response_logp(model, sequences))
    rough = torch.cat(response_logp(model, sequences, dtype=torch.bfloat16))
    assert seen == {(torch.float32, torch.float32, False)}
    assert 0 < (exact - rough).abs().max() < 0.1
