"""A cached reference is the live one with its states rounded to bfloat16, and must be the right one."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from scoring_for_tests import TOKENIZER, make_pairs, make_tokenizer
from tiny import V, tiny_model
from transformers import AutoModelForCausalLM

from sepo.data import pack
from sepo.data.hidden import StoredHead
from sepo.data.segments import make_segments
from sepo.data.selection import Selection
from sepo.data.store.store import ScoredStore
from sepo.errors import InputError
from sepo.model.forward import head, hidden_states, token_logprob
from sepo.model.prepare import prepare_model
from sepo.model.reference import (
    CachedReference,
    LiveReference,
    cached_reference,
    load_reference,
    token_logprob_kl,
)
from sepo.score.score import score_dataset

WIDE = dict(seed=7, hidden_size=48, intermediate_size=40, tie_word_embeddings=False)


class Rounded(LiveReference):
    @torch.no_grad()
    def hidden(self, batch, like):
        with torch.autocast("cpu", enabled=False):  # as it was scored
            return hidden_states(self.model, batch).bfloat16().to(like)


@pytest.fixture(scope="module")
def live():
    """Wider than the policies, and in float64: its rounded states are the same in any batch."""
    return LiveReference(prepare_model(tiny_model("qwen2", dtype=torch.float64, **WIDE)))


@pytest.fixture(scope="module")
def store(live, tmp_path_factory):
    path = tmp_path_factory.mktemp("store")
    keep = dict(reference=live.model, tokenizer=TOKENIZER, keep=("logp", "hidden"))
    score_dataset(make_pairs(), path, pairs_per_part=4, progress=False, **keep)
    return ScoredStore.open(path, TOKENIZER)


def batch_of(pairs):
    # half of the tokens: other batches, other truncation and repeated rows than in scoring
    return pack([make_segments(pair, Selection("random", fraction=0.5)) for pair in pairs])


def run(policy, batch, reference, *, autocast=False, **how):
    policy.zero_grad()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        logp, ref_logp, kl = token_logprob_kl(policy, batch, reference, **how)
    (logp.sum() + 0.3 * kl.sum()).backward()
    return [logp, ref_logp, kl], [p.grad.clone() for p in policy.parameters()]


@pytest.mark.parametrize("arch", ["llama", "gpt_neox"])
@pytest.mark.parametrize("direction", ["ref||policy", "policy||ref"])
@pytest.mark.parametrize("autocast", [False, True])
def test_cached_is_the_live_reference_rounded(live, store, arch, direction, autocast):
    policy, batch = prepare_model(tiny_model(arch)), batch_of(store.pairs())
    cached = CachedReference(store.reference_head())
    how = dict(direction=direction, autocast=autocast)
    values, gradients = run(policy, batch, cached, **how)
    expected, expected_gradients = run(policy, batch, Rounded(live.model), **how)
    assert all(map(torch.equal, values, expected))
    assert all(map(torch.equal, gradients, expected_gradients))
    assert values[2].max() > 0.1 and all(g.abs().max() > 0 for g in gradients)
    if autocast:  # the heads' products are autocast's too
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(values[0], token_logprob(policy, batch))
    else:  # rounding is the only difference, and shows
        exact = run(policy, batch, live, **how)[0]
        assert 1e-5 < (exact[2] - values[2]).abs().max() < 0.2


@pytest.mark.parametrize("arch", ["llama", "gpt_neox"])
def test_live_values_against_dense_passes(live, store, arch):
    policy, batch = prepare_model(tiny_model(arch)), batch_of(store.pairs())
    logp, ref_logp, kl = token_logprob_kl(policy, batch, live, direction="policy||ref")
    p, q = (dense(model, batch).log_softmax(-1) for model in (policy, live.model))
    where = torch.arange(len(batch.rows)), batch.targets
    torch.testing.assert_close(logp, p[where].float(), atol=2e-5, rtol=0)
    torch.testing.assert_close(ref_logp, q[where].float(), atol=2e-5, rtol=0)
    torch.testing.assert_close(kl, (p.exp() * (p - q)).sum(-1).float(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(logp, token_logprob(policy, batch))
    # what `--keep logp` wrote is what the rows say of the targets
    torch.testing.assert_close(ref_logp, batch.ref_logp, atol=2e-5, rtol=0)


@torch.no_grad()
def dense(model, batch):  # (M, V) float64
    weight, bias, *_ = head(model)
    states = hidden_states(model, batch)[batch.rows].double()
    return states @ weight.double().T + (0 if bias is None else bias.double())


def test_an_empty_batch_runs_the_policy_alone(store):
    policy = prepare_model(tiny_model())
    values, gradients = run(policy, pack([]), CachedReference(store.reference_head()))
    assert all(value.shape == (0,) for value in values)
    assert not any(g.any() for g in gradients)


def stored_head(width=8, vocabulary=V, scale=1.0, softcap=None):
    return CachedReference(StoredHead(torch.zeros(vocabulary, width), None, scale, softcap))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (stored_head(vocabulary=V + 3), "expected the policy's vocabulary, 61, got 64"),
        (stored_head(scale=0.5), "expected the policy's logit scale, 1.0, got 0.5"),
        (stored_head(softcap=30.0), "expected the policy's logit soft cap, None, got 30.0"),
        (CachedReference(None), "--keep hidden.*got one with log-probabilities alone"),
        (stored_head(), "expected pairs with the reference's hidden rows, got some without"),
    ],
)
def test_a_reference_that_does_not_fit(reference, message):
    with pytest.raises(InputError, match=message):
        token_logprob_kl(prepare_model(tiny_model()), batch_of(make_pairs()), reference)


# Which reference a run takes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint in float32, and what was scored with it in float32 and in bfloat16."""
    path = tmp_path_factory.mktemp("reference")
    tiny_model("gpt_neox").save_pretrained(path / "model", max_shard_size="20KB")
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(path / "model", dtype=dtype)
        keep = dict(keep=("logp", "hidden"), precision_check=0, progress=False)
        score_dataset(
            make_pairs(4), path / str(dtype), reference=prepare_model(model.eval()),
            tokenizer=TOKENIZER, **keep,
        )  # fmt: skip
    return path


def open_store(folder, dtype=torch.float32):
    return ScoredStore.open(folder / str(dtype))


@pytest.fixture
def no_load(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


def load(folder, data, *, path=None, tokenizer=TOKENIZER, keep="hidden", **more):
    return load_reference(path or str(folder / "model"), data, tokenizer, keep=keep, **more)


@pytest.mark.parametrize("keep", ["logp", "hidden"])
def test_a_cached_reference_is_not_loaded(folder, no_load, keep):
    assert isinstance(load(folder, {"data": open_store(folder)}, keep=keep), CachedReference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_precision_is_at_least_the_policys(folder, no_load, dtype):
    data = {"data": open_store(folder, dtype)}
    found = load(folder, data, dtype=torch.bfloat16)
    assert found.head(torch.zeros(1)).weight.dtype == torch.float32  # for a policy in float32
    if dtype == torch.bfloat16:
        message = "expected a reference computed in float32 at least, got bfloat16; score"
        with pytest.raises(InputError, match=message):
            load(folder, data)


@pytest.mark.parametrize("keep", ["logp", "hidden"])
def test_data_that_keeps_nothing_of_it_makes_it_live(folder, keep):
    for data in ({"data": make_pairs()}, {"data": open_store(folder), "more": make_pairs()}):
        assert cached_reference(str(folder / "model"), data, TOKENIZER, keep=keep) is None
        found = load(folder, data, keep=keep)
        assert isinstance(found, LiveReference)
        assert not any(p.requires_grad for p in found.model.parameters())


def test_other_weights(folder, tmp_path, no_load):
    tiny_model("gpt_neox", seed=3).save_pretrained(tmp_path)
    message = (
        r"some/store: expected the reference's weights [0-9a-f]{12} \(.*\), got "
        "[0-9a-f]{12}, with which its hidden rows were scored"
    )
    with pytest.raises(InputError, match=message):
        load(folder, {"some/store": open_store(folder)}, path=str(tmp_path))
    with pytest.raises(InputError, match=message):  # though the other data makes it live
        data = {"more": make_pairs(), "some/store": open_store(folder)}
        load(folder, data, path=str(tmp_path))


def test_another_tokenizer_or_template(folder, no_load):
    data, spoken = {"data": open_store(folder)}, make_tokenizer()
    spoken.chat_template = "{{ messages }}"
    with pytest.raises(InputError, match="expected the reference's tokenizer .*, got"):
        load(folder, data, tokenizer=make_tokenizer(3))
    message = r"reference's chat template [0-9a-f]{12} \(.*\), got none, with which its log-prob"
    with pytest.raises(InputError, match=message):
        load(folder, data, tokenizer=spoken, keep="logp")


def test_rows_of_one_pair_are_read_by_position(store):
    pair = store[2]
    batch = batch_of([pair])
    _, chosen, rejected = make_segments(pair, Selection("random", fraction=0.5))
    expected = [
        rows.read(np.arange(len(rows), dtype=np.int32))[segment.positions]
        for rows, segment in (
            (pair.chosen_ref_hidden, chosen), (pair.rejected_ref_hidden, rejected)
        )
    ]  # fmt: skip
    assert torch.equal(batch.ref_hidden, torch.cat(expected))
    assert batch.to("meta").ref_hidden.is_meta
