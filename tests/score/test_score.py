"""Scores are right, in the order of the data, and wrong input is named."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from scoring_for_tests import (
    ORACLE,
    QUIET,
    REFERENCE,
    TOKENIZER,
    make_models,
    make_pairs,
    parts,
)
from tiny import V, tiny_model

from sepo.data.store.store import ScoredStore
from sepo.data.types import TokenPair
from sepo.errors import InputError
from sepo.model.prepare import prepare_model
from sepo.score.logp import _batches
from sepo.score.score import score_dataset, score_pairs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run of one process."""
    path = tmp_path_factory.mktemp("whole")
    return score_dataset(make_pairs(), path, reference=REFERENCE, oracle=ORACLE, **QUIET)


@pytest.mark.parametrize("arch", ["llama", "gpt_neox"])
@pytest.mark.parametrize("max_tokens", [24, 40, 8192])
def test_scores_against_dense_passes(arch, max_tokens):
    reference, oracle = make_models(arch)
    pairs = make_pairs()
    found = score_pairs(pairs, reference, oracle, keep=("score", "logp"), max_tokens=max_tokens)
    dense = [plain_float64(model, arch) for model in (reference, oracle)]
    for pair, result in zip(pairs, found, strict=True):
        assert result.id == pair.id
        for side in ("chosen", "rejected"):
            ref_logp, logp = (unpacked_logp(m, pair.prompt, getattr(pair, side)) for m in dense)
            score, kept = getattr(result, f"{side}_score"), getattr(result, f"{side}_ref_logp")
            assert score.dtype == kept.dtype == np.float32
            np.testing.assert_allclose(kept, ref_logp, atol=2e-5)
            np.testing.assert_allclose(score, logp - ref_logp, atol=2e-5)
            assert np.abs(logp - ref_logp).max() > 1e-3  # the tolerance can tell


def plain_float64(model, arch):
    plain = tiny_model(arch, dtype=torch.float64)
    plain.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    return plain


@torch.no_grad()
def unpacked_logp(model, prompt, response):
    ids = torch.from_numpy(np.concatenate([prompt, response])).long()[None]
    logp = model(input_ids=ids).logits[0].log_softmax(-1)
    rows = torch.arange(len(prompt) - 1, len(ids[0]) - 1)
    return logp[rows, ids[0, len(prompt) :]].numpy()


def test_batches_fill_the_budget_and_never_pass_it():
    token = np.zeros(1, np.int32)
    lengths = [5, 9, 3, 14, 4, 3]  # 3 + 3 + 4, 5 + 9, 14
    pairs = [
        TokenPair(id="", prompt=token, chosen=token, rejected=token.repeat(n - 2)) for n in lengths
    ]
    assert _batches(pairs, 14) == [[2, 5, 4], [0, 1], [3]]


@pytest.mark.parametrize("arch", ["llama", "gpt_neox"])
def test_hidden_rows_are_the_states_that_predict(arch, tmp_path):
    reference, _ = make_models(arch)
    keep = dict(keep=("hidden",), max_tokens=40)
    store = score_dataset(make_pairs(), tmp_path, reference=reference, **keep, **QUIET)
    plain = plain_float64(reference, arch)
    for pair in ScoredStore.open(store).pairs():
        for side in ("chosen", "rejected"):
            response, rows = getattr(pair, side), getattr(pair, f"{side}_ref_hidden")
            found = rows.read(np.arange(len(response), dtype=np.int32))
            expected = unpacked_hidden(plain, pair.prompt, response)
            assert found.dtype == torch.bfloat16
            # half a unit in the last of bfloat16's 8 bits, and float32's own error
            torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-5)
        assert pair.chosen_ref_logp is None and pair.chosen_score is None


@torch.no_grad()
def unpacked_hidden(model, prompt, response):
    ids = torch.from_numpy(np.concatenate([prompt, response])).long()[None]
    states = model.get_decoder()(input_ids=ids).last_hidden_state[0]  # after the final norm
    return states[len(prompt) - 1 : -1]


def test_one_pass_gives_log_probabilities_and_states():
    passes = []
    hook = REFERENCE.get_decoder().register_forward_hook(lambda *_: passes.append(1))
    both = score_pairs(make_pairs(), REFERENCE, ORACLE, keep=("score", "logp", "hidden"))
    hook.remove()
    assert len(passes) == 1
    weight = REFERENCE.get_output_embeddings().weight
    for pair in both:
        states = pair.rejected_ref_hidden.read(np.arange(len(pair.rejected), dtype=np.int32))
        logp = (states.float() @ weight.T).log_softmax(-1)
        logp = logp[range(len(logp)), pair.rejected].detach().numpy()
        np.testing.assert_allclose(logp, pair.rejected_ref_logp, atol=0.05)  # bfloat16 states


def test_the_manifest_and_the_head_of_kept_states(tmp_path):
    model = prepare_model(tiny_model("gpt2", dtype=torch.bfloat16))
    score_dataset(
        make_pairs(), tmp_path, reference=model, keep=("hidden", "logp"), precision_check=0, **QUIET
    )
    store = ScoredStore.open(tmp_path)
    manifest, head = store.manifest, store.reference_head()
    assert manifest["keep"] == ["hidden", "logp"]
    assert (manifest["hidden_width"], manifest["hidden_dtype"]) == (32, "bfloat16")
    assert torch.equal(head.weight, model.lm_head.weight) and head.weight.dtype == torch.bfloat16
    assert head[1:] == (None, 1.0, None)


def test_size_of_the_states_is_told_and_must_fit(tmp_path, capsys, monkeypatch):
    keep = dict(reference=REFERENCE, keep=("hidden",), **QUIET | {"progress": True})
    tokens = sum(len(p.chosen) + len(p.rejected) for p in make_pairs())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=tokens * 64 - 1))
    with pytest.raises(InputError, match="rows take 6.66 kB, but the disk has 6.66 kB left"):
        score_dataset(make_pairs(), tmp_path / "out", **keep)
    assert f"6.66 kB to write ({tokens} response tokens x 32 x 2 bytes)" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=tokens * 64))
    score_dataset(make_pairs(), tmp_path / "out", **keep)
    score_dataset(make_pairs(), tmp_path / "out", **keep)
    assert "reference rows: 0 bytes to write" in capsys.readouterr().out


def test_a_pair_longer_than_the_budget(tmp_path):
    longest = max(map(len, make_pairs()))
    row = next(p.id for p in make_pairs() if len(p) == longest)
    message = f"pair {row}: {longest} tokens, expected at most --max_tokens_per_batch {longest - 1}"
    models = dict(reference=REFERENCE, oracle=ORACLE)
    with pytest.raises(InputError, match=message):
        score_dataset(make_pairs(), tmp_path / "out", **models, max_tokens=longest - 1, **QUIET)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=message):
        score_pairs(make_pairs(), **models, max_tokens=longest - 1)
    score_pairs(make_pairs(), **models, max_tokens=longest)


@pytest.mark.parametrize(
    ("models", "keep", "message"),
    [
        ((REFERENCE, None), ("score",), "a score needs an oracle"),
        ((REFERENCE, ORACLE), ("logp",), r"\['logp'\] does not use the oracle"),
        ((None, ORACLE), ("score", "hidden"), "needs a pass of the reference"),
    ],
)
def test_pairs_in_memory_are_refused_what_a_store_is(models, keep, message):
    with pytest.raises(InputError, match=message):
        score_pairs(make_pairs(), *models, keep=keep)


def test_rows_keep_the_order_of_the_data(whole):
    store = ScoredStore.open(whole, tokenizer=TOKENIZER)
    direct = score_pairs(make_pairs(), REFERENCE, ORACLE)
    for stored, pair in zip(store.pairs(), direct, strict=True):
        assert stored.id == pair.id and np.array_equal(stored.rejected, pair.rejected)
        np.testing.assert_allclose(stored.rejected_score, pair.rejected_score, atol=1e-5)


def test_manifest_says_what_made_the_store(whole):
    manifest = ScoredStore.open(whole).manifest
    assert manifest["complete"] and manifest["pairs"] == 10
    assert manifest["tokens"] == sum(map(len, make_pairs()))
    assert manifest["oracle_dtype"] == manifest["reference_dtype"] == "float32"
    assert manifest["devices"] == ["cpu"] and manifest["precision_check"] is None
    written = json.loads((whole / "manifest.json").read_text())
    assert len(written.pop("check")) == 64 and manifest == written


def test_reading_counts_and_weights_pass_through(tmp_path):
    pairs = make_pairs(2)
    weight = np.arange(len(pairs[0].chosen), dtype=np.float32)
    pairs[0] = replace(pairs[0], chosen_weight=weight)
    extra = dict(report={"dropped": 3}, max_length=64)
    score_dataset(pairs, tmp_path, reference=REFERENCE, oracle=ORACLE, **extra, **QUIET)
    store = ScoredStore.open(tmp_path)
    assert store.manifest["reading"] == {"dropped": 3} and store.manifest["max_length"] == 64
    assert np.array_equal(store[0].chosen_weight, weight) and store[0].rejected_weight is None


def test_reference_alone(tmp_path):
    score_dataset(make_pairs(), tmp_path, reference=REFERENCE, keep=("logp",), **QUIET)
    pair = ScoredStore.open(tmp_path)[3]
    expected = score_pairs(make_pairs(), REFERENCE, keep=("logp",))[3]
    np.testing.assert_allclose(pair.chosen_ref_logp, expected.chosen_ref_logp, atol=1e-5)
    assert pair.chosen_score is None and pair.rejected_score is None


def kept(path, pairs, **more):
    """The reference's log-probabilities, as `sepo score --keep logp` writes them."""
    options = dict(reference=REFERENCE, keep=("logp",)) | QUIET | more
    return ScoredStore.open(score_dataset(pairs, path, **options))


def test_a_kept_reference_is_not_run_again(tmp_path):
    """Bit for bit the store that both models would have written, by one of them."""
    pairs = [replace(p, chosen_weight=np.ones(len(p.chosen), np.float32)) for p in make_pairs()]
    store = kept(tmp_path / "kept", pairs, report={"read": 12}, max_length=64)
    how = dict(oracle=ORACLE, keep=("score", "logp"), **QUIET)
    passes = []
    hook = REFERENCE.get_decoder().register_forward_hook(lambda *_: passes.append(1))
    score_dataset(store, tmp_path / "one", reference=None, **how)
    hook.remove()
    assert not passes
    score_dataset(pairs, tmp_path / "both", reference=REFERENCE, **how)
    assert parts(tmp_path / "one") == parts(tmp_path / "both")
    # so one goes on where the other was killed
    (tmp_path / "both" / "part-00003-of-00005.parquet").unlink()
    score_dataset(store, tmp_path / "both", reference=None, **how)
    assert parts(tmp_path / "one") == parts(tmp_path / "both")


def test_a_reference_that_is_neither_given_nor_kept(tmp_path, whole):
    how = dict(reference=None, oracle=ORACLE, **QUIET)
    for pairs in (make_pairs(), ScoredStore.open(whole)):  # the latter keeps scores alone
        with pytest.raises(InputError, match="expected a model, or a store with its log-prob"):
            score_dataset(pairs, tmp_path / "out", **how)
    store = kept(tmp_path / "kept", make_pairs())
    with pytest.raises(InputError, match=r"keep: \['hidden', 'score'\] needs a pass of the ref"):
        score_dataset(store, tmp_path / "out", keep=("score", "hidden"), **how)
    with pytest.raises(InputError, match=r"keep: \['logp'\] needs a pass of the reference"):
        score_dataset(store, tmp_path / "out", keep=("logp",), **how | {"oracle": None})
    assert not (tmp_path / "out").exists()
    with pytest.raises(
        InputError, match="pair r0: expected the reference's log-probabilities, got"
    ):
        score_pairs(list(ScoredStore.open(whole).pairs()), None, ORACLE)


@pytest.mark.parametrize("role", ["reference", "oracle"])
def test_nan_names_the_row_and_writes_nothing_of_its_part(tmp_path, role):
    sick = prepare_model(tiny_model(tie_word_embeddings=False))
    with torch.no_grad():
        sick.get_input_embeddings().weight[V - 1] = torch.nan
    pairs = make_pairs()
    healthy = np.array([2, 3], np.int32)
    for i, pair in enumerate(pairs):
        pairs[i] = TokenPair(id=pair.id, prompt=healthy, chosen=healthy, rejected=healthy)
    pairs[5] = replace(pairs[5], rejected=np.array([2, V - 1, 4], np.int32))
    models = {"reference": REFERENCE, "oracle": ORACLE} | {role: sick}
    message = rf"pair r5: the {role} \(float32\) gave the log-probability nan to rejected token"
    with pytest.raises(InputError, match=message):
        score_dataset(pairs, tmp_path, **models, **QUIET)
    assert [name[:10] for name in parts(tmp_path)] == ["part-00000", "part-00001"]
    assert not list(tmp_path.glob(".*"))


def test_the_same_model_twice_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="the same weights: every score will be zero"):
        score_dataset(make_pairs(), tmp_path, reference=REFERENCE, oracle=REFERENCE, **QUIET)
    assert not ScoredStore.open(tmp_path)[0].chosen_score.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(pairs=[]), "expected at least one pair"),
        (dict(pairs_per_part=0), "pairs_per_part: expected at least 1, got 0"),
        (dict(oracle=None), "a score needs an oracle"),
        (dict(keep=("logp",)), r"keep: \['logp'\] does not use the oracle"),
        (dict(keep=("scores",)), r"expected some of score, logp, hidden, got \['scores'\]"),
        (dict(keep=()), "keep: expected some of score"),
        (dict(shard=(2, 2)), "expected i/n with 0 <= i < n, got 2/2"),
    ],
)
def test_refusals(tmp_path, change, message):
    arguments = dict(pairs=make_pairs(), output_dir=tmp_path, reference=REFERENCE, oracle=ORACLE)
    with pytest.raises(InputError, match=message):
        score_dataset(**{**arguments, **QUIET, **change})


@pytest.mark.parametrize("role", ["reference", "oracle"])
def test_token_outside_the_vocabulary(tmp_path, role):
    models = {"reference": REFERENCE, "oracle": ORACLE}
    models[role] = prepare_model(tiny_model(vocab_size=V - 1))
    pairs = make_pairs()
    pairs[4] = replace(pairs[4], chosen=np.array([V - 1], np.int32))
    pairs = pairs[4:]
    with pytest.raises(
        InputError, match=f"pair r4: token 60, but the {role} has a vocabulary of 60"
    ):
        score_dataset(pairs, tmp_path, **models, **QUIET)


def test_end_of_a_run_is_reported(tmp_path, capsys):
    run = lambda shard: score_dataset(
        make_pairs(),
        tmp_path,
        reference=REFERENCE,
        oracle=ORACLE,
        shard=shard,
        **QUIET | {"progress": True},
    )
    run((0, 2))
    assert "2 of 5 parts are left to the other shards" in capsys.readouterr().out
    run((1, 2))
    printed = capsys.readouterr().out
    assert f"complete store: {tmp_path}" in printed
    tokens = sum(len(p) for p in [*make_pairs()[2:4], *make_pairs()[6:8]])  # of its two parts
    last = printed.splitlines()[-1]
    assert last.startswith(f"scored {tokens} tokens in ") and last.endswith(" tokens/s")
