import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from processes import cut_short
from scoring_runs import of_before
from tokenizers_for_tests import CHATML, chatml_tokenizer, plain_tokenizer
from transferred_stores import QUIET, ROWS, carry, make_store, turns, write
from vocabularies import TRAINED

from sepo.commands.main import run
from sepo.data.align import TokenBytes
from sepo.data.read.read import read_pairs
from sepo.data.read.render import spans
from sepo.data.segments import make_segments
from sepo.data.selection import Selection, select_positions
from sepo.data.store.store import (
    ScoredStore,
    tokenizer_hash,
)
from sepo.errors import InputError
from sepo.system.lock import lock
from sepo.transfer import store as transfer
from sepo.transfer.store import read_preferences, transfer_store


def of_bytes(tokenizer, preference, side, ids, values):
    """One value a byte of the response, the end-of-turn's last."""
    span = spans(preference, tokenizer)[side == "rejected"]
    return np.repeat(values, np.diff(TokenBytes(tokenizer).place(ids, span).bounds))


@pytest.mark.parametrize("form", [lambda row: row, turns], ids=["plain", "chat"])
@pytest.mark.parametrize("target", ["sentencepiece", "tiktoken-like"])
def test_every_token_gets_the_mean_of_its_bytes(tmp_path, form, target):
    source, target = chatml_tokenizer(), TRAINED[target]()
    rows = [form(row) for row in ROWS]
    store, carried, coverage = carry(tmp_path, rows, source, target, pairs_per_part=2)
    assert coverage.rows == len(store) == len(carried) == 3 and not coverage.left_out
    for i, preference in enumerate(read_preferences(str(tmp_path / "rows.jsonl"))):
        for side in ("chosen", "rejected"):
            ids, score = getattr(carried[i], side), getattr(carried[i], f"{side}_score")
            theirs = getattr(store[i], side), getattr(store[i], f"{side}_score")
            before = of_bytes(source, preference, side, *theirs)
            after = of_bytes(target, preference, side, ids, score)
            assert before[-1] == after[-1]  # end of turn to end of turn
            # SentencePiece's template trims the response
            shown = [spans(preference, t)[side == "rejected"] for t in (source, target)]
            texts = [span.text[span.start : span.end] for span in shown]
            lead = len(texts[0].encode()) - len(texts[0].lstrip().encode())
            skip = lead if texts[0] != texts[1] else 0
            before = before[skip : skip + len(after) - 1]
            token = np.repeat(np.arange(len(ids)), np.diff(_bounds(target, ids, shown[1])))[:-1]
            for t in np.unique(token):
                np.testing.assert_allclose(score[t], before[token == t].mean(), rtol=1e-6)


def _bounds(tokenizer, ids, span):
    return TokenBytes(tokenizer).place(ids, span).bounds


def test_the_same_tokenizer_changes_no_bit(tmp_path):
    for tokenizer in (chatml_tokenizer(), TRAINED["sentencepiece"]()):
        place = tmp_path / tokenizer.eos_token.strip("<>|/")
        place.mkdir()
        store, carried, coverage = carry(place, [turns(row) for row in ROWS], tokenizer, tokenizer)
        for before, after in zip(store.pairs(), carried.pairs(), strict=True):
            for name in ("id", "chosen", "rejected", "chosen_score", "rejected_score"):
                assert np.array_equal(getattr(before, name), getattr(after, name))
        assert coverage.counts["uncovered"] == 0


def test_a_store_says_where_it_comes_from_and_trains(tmp_path):
    target = TRAINED["sentencepiece"]()
    store, carried, coverage = carry(tmp_path, ROWS, chatml_tokenizer(), target, max_length=99)
    about = carried.manifest
    assert about["tokenizer"] == tokenizer_hash(target) and about["keep"] == ["score"]
    assert about["oracle"] == "some" and about["reference"] == "other"
    assert about["devices"] == ["cpu"] and about["max_length"] == 99 and about["complete"]
    assert about["transferred"] == {
        "from": str(store.path), "mode": "score", "aggregate": "mean",
        "tokenizer": store.manifest["tokenizer"], "tokenizer_name": "the oracle's",
        "source": store.manifest["source"], "coverage": coverage.as_dict(),
    }  # fmt: skip
    _, chosen, rejected = make_segments(carried[0], Selection("selected", fraction=0.3))
    score = carried[0].rejected_score
    assert rejected.positions.tolist() == select_positions(score, 0.3, "lowest").tolist()
    with pytest.raises(InputError, match="scored with tokenizer"):
        ScoredStore.open(tmp_path / "out", chatml_tokenizer())


def test_the_most_decisive_byte(tmp_path):
    source, target = TRAINED["tiktoken-like"](), chatml_tokenizer()
    row = {"prompt": "Say:", "chosen": " The world", "rejected": " The Rhine. Hello Tell me"}
    store, high, _ = carry(tmp_path, [row], source, target, aggregate="max")
    (preference,) = read_preferences(str(tmp_path / "rows.jsonl"))
    for side, most in (("chosen", np.max), ("rejected", np.min)):
        before = of_bytes(
            source, preference, side, getattr(store[0], side), getattr(store[0], f"{side}_score")
        )
        ids, span = getattr(high[0], side), spans(preference, target)[side == "rejected"]
        bounds = _bounds(target, ids, span)
        expected = [most(before[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
        assert getattr(high[0], f"{side}_score").tolist() == expected
        # tokens that hold bytes of several: else nothing was to be decided
        assert any(np.ptp(before[a:b]) for a, b in zip(bounds, bounds[1:], strict=False))


def test_overlap_gives_weights_that_the_trainer_uses(tmp_path):
    source, target = chatml_tokenizer(), TRAINED["tiktoken-like"]()
    store, carried, coverage = carry(tmp_path, ROWS, source, target, mode="overlap", fraction=0.4)
    assert carried.manifest["keep"] == ["weight"]
    assert carried.manifest["transferred"]["fraction"] == 0.4
    selected = num_source = 0
    for i, preference in enumerate(read_preferences(str(tmp_path / "rows.jsonl"))):
        for side, best in (("chosen", "highest"), ("rejected", "lowest")):
            positions = select_positions(getattr(store[i], f"{side}_score"), 0.4, best)
            mark = np.zeros(len(getattr(store[i], side)))
            mark[positions] = 1
            before = of_bytes(source, preference, side, getattr(store[i], side), mark)
            ids, weight = getattr(carried[i], side), getattr(carried[i], f"{side}_weight")
            assert getattr(carried[i], f"{side}_score") is None
            span = spans(preference, target)[side == "rejected"]
            bounds = _bounds(target, ids, span)
            stretches = zip(bounds, bounds[1:], strict=False)
            assert weight.tolist() == [float(before[a:b].any()) for a, b in stretches]
            selected, num_source = selected + weight.sum(), num_source + len(positions)
        _, chosen, _ = make_segments(carried[i], Selection("selected", fraction=0.01))
        assert chosen.positions.tolist() == np.flatnonzero(carried[i].chosen_weight).tolist()
    assert coverage.counts["selected"] == selected
    assert coverage.counts["source_selected"] == num_source


def test_what_cannot_be_carried_is_named_and_counted(tmp_path):
    rows = [{**row, "id": f"r{i}"} for i, row in enumerate(ROWS)]
    # plain_tokenizer composes é: r1 is not the text that it was
    _, carried, coverage = carry(tmp_path, rows, chatml_tokenizer(), plain_tokenizer())
    assert [pair.id for pair in carried.pairs()] == ["r0", "r2"]
    (why,) = coverage.left_out
    assert why.startswith("the policy's tokens do not spell") and coverage.left_out[why] == ["r1"]
    assert carried.manifest["transferred"]["coverage"]["left_out"] == coverage.left_out
    assert f"1 {why} (pair r1)" in str(coverage) and "2 rows carried" in str(coverage)
    other = tmp_path / "other"
    other.mkdir()
    _, _, coverage = carry(other, rows, plain_tokenizer(), chatml_tokenizer())
    (why,) = coverage.left_out
    assert why.startswith("the oracle's tokens do not spell")


def test_rows_of_one_id_are_told_apart_as_they_were_when_scored(tmp_path):
    rows = [{**row, "id": "same"} for row in ROWS]
    _, carried, coverage = carry(tmp_path, rows, chatml_tokenizer(), TRAINED["tiktoken-like"]())
    assert [pair.id for pair in carried.pairs()] == ["same", "same#1", "same#2"]
    assert not coverage.left_out


def test_rows_on_one_side_only_are_named(tmp_path):
    source, target = chatml_tokenizer(), TRAINED["sentencepiece"]()
    data = write(tmp_path / "rows.jsonl", ROWS)
    store = make_store(tmp_path / "scores", data, source, limit=2)
    more = write(tmp_path / "more.jsonl", [ROWS[0], {**ROWS[0], "chosen": ""}, ROWS[2]])
    coverage = transfer_store(
        store, read_pairs(more, target), read_preferences(more), tmp_path / "out",
        oracle_tokenizer=source, policy_tokenizer=target, **QUIET,
    )  # fmt: skip
    assert coverage.rows == 1
    assert [ids for _, ids in sorted(coverage.left_out.items())] == [["1"], ["2"]]
    assert sorted(coverage.left_out)[0].startswith("in the store, but not")
    assert sorted(coverage.left_out)[1] == "not in the store"


def test_a_cut_leaves_tokens_without_a_score_which_are_selected_last(tmp_path):
    source, target = chatml_tokenizer(), TRAINED["tiktoken-like"]()
    data = write(tmp_path / "rows.jsonl", [{**ROWS[0], "chosen": " quick brown foxes jump"}])
    store = make_store(tmp_path / "scores", data, source, max_length=9)
    how = dict(oracle_tokenizer=source, policy_tokenizer=target, **QUIET)
    both = read_pairs(data, target), read_preferences(data)
    coverage = transfer_store(store, *both, tmp_path / "out", **how)
    assert coverage.counts["source_cut"] == 2 and coverage.counts["cut"] == 0
    assert coverage.counts["one_end"] == 2
    (pair,) = ScoredStore.open(tmp_path / "out").pairs()
    (preference,) = read_preferences(data)
    uncovered = 0
    for i, (side, sign) in enumerate((("chosen", 1), ("rejected", -1))):
        read, ids = getattr(store[0], side), getattr(pair, side)
        reach = _bounds(source, read, spans(preference, source)[i])[-1]
        is_bare = _bounds(target, ids, spans(preference, target)[i])[:-1] >= reach
        score = sign * getattr(pair, f"{side}_score")
        assert 1 < is_bare.sum() < len(ids)
        assert (score[is_bare] == min(0, score[~is_bare].min())).all()
        uncovered += is_bare.sum()
    assert coverage.counts["uncovered"] == uncovered
    text = str(coverage)
    assert "2 responses cut at max_length in the store" in text and "without a byte" in text


def test_nothing_selected_is_left(tmp_path):
    """The oracle selects the end of the turn alone; the policy's responses have none."""
    source, target = chatml_tokenizer(), TRAINED["tiktoken-like"]()
    data = write(tmp_path / "rows.jsonl", ROWS[:1])
    last = lambda ids: np.arange(len(ids), dtype=np.float32) * (1 if ids[0] == chosen[0] else -1)
    chosen = read_pairs(data, source).pairs[0].chosen
    store = make_store(tmp_path / "scores", data, source, draw=last)
    both = read_pairs(data, target, append_eos=False), read_preferences(data)
    how = dict(oracle_tokenizer=source, policy_tokenizer=target, mode="overlap", **QUIET)
    with pytest.raises(
        InputError, match="got none: 1 no token of a response holds a byte of a sel"
    ):
        transfer_store(store, *both, tmp_path / "out", fraction=0.01, **how)
    assert not (tmp_path / "out").exists()


# --- the command


def command(tmp_path, *more, source=None, target=None, scores=None):
    folders = {}
    for role, tokenizer in (("oracle", source), ("policy", target)):
        folders[role] = tmp_path / role
        tokenizer.save_pretrained(folders[role])
    run(
        ["transfer", "--scores", str(scores or tmp_path / "scores"), "--oracle",
         str(folders["oracle"]), "--dataset_name", str(tmp_path / "rows.jsonl"),
         "--model_name_or_path", str(folders["policy"]), "--output_dir", str(tmp_path / "out"),
         *more]
    )  # fmt: skip


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "rows.jsonl", [turns(row) for row in ROWS])


@pytest.fixture
def both():
    return dict(source=chatml_tokenizer(), target=TRAINED["sentencepiece"]())


def test_the_command(tmp_path, data, both, capsys):
    make_store(tmp_path / "scores", data, both["source"])
    command(tmp_path, **both)
    said = capsys.readouterr().out
    assert "3 rows carried" in said and f"complete store: {tmp_path / 'out'}" in said
    before = [p.chosen_score.tolist() for p in ScoredStore.open(tmp_path / "out").pairs()]
    command(tmp_path, **both)  # again: the same, and nothing is refused
    after = [p.chosen_score.tolist() for p in ScoredStore.open(tmp_path / "out").pairs()]
    assert before == after
    with pytest.raises(InputError, match="expected an empty directory or this transfer begun"):
        command(tmp_path, "--aggregate", "max", **both)


def test_the_command_in_overlap_mode_with_a_limit(tmp_path, data, both, capsys):
    make_store(tmp_path / "scores", data, both["source"])
    command(tmp_path, "--mode", "overlap", "--fraction", "0.5", "--limit", "2", **both)
    assert "of them selected" in capsys.readouterr().out
    carried = ScoredStore.open(tmp_path / "out")
    assert len(carried) == 2 and carried.manifest["transferred"]["fraction"] == 0.5


def test_a_flag_of_the_other_mode_is_refused(tmp_path, both):
    with pytest.raises(InputError, match="--fraction: expected with --mode overlap, got --mode sc"):
        command(tmp_path, "--fraction", "0.5", **both)
    with pytest.raises(InputError, match="--aggregate: expected with --mode score, got --mode ov"):
        command(tmp_path, "--mode", "overlap", "--aggregate", "max", **both)


def test_another_oracles_tokenizer_or_template_is_refused(tmp_path, data, both):
    make_store(tmp_path / "scores", data, both["source"])
    with pytest.raises(InputError, match="expected the tokenizer that made the store, of the ora"):
        command(tmp_path, source=both["target"], target=both["target"])
    other = chatml_tokenizer(CHATML + " ")
    with pytest.raises(InputError, match="expected the chat template that made the store"):
        command(tmp_path, source=other, target=both["target"])


def test_a_store_without_scores_is_refused(tmp_path, data, both):
    make_store(tmp_path / "scores", data, both["source"], keep=("logp",))
    with pytest.raises(InputError, match=r"expected a store with scores, got \['logp'\]"):
        command(tmp_path, **both)


def test_token_ids_are_refused(tmp_path, both):
    ids = {"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}
    data = write(tmp_path / "rows.jsonl", [ids])
    make_store(tmp_path / "scores", data, both["source"])
    with pytest.raises(InputError, match="pair 0: expected text, .*, got token ids"):
        command(tmp_path, **both)


def test_an_output_that_can_not_be_is_refused_before_anything_is_loaded(
    tmp_path, data, both, monkeypatch
):
    monkeypatch.setattr("sepo.commands.transfer.load_tokenizer", None)
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/sepo")):
        with pytest.raises(InputError, match=f"{output}: expected a folder to write to, got "):
            command(tmp_path, "--output_dir", str(output), **both)
    with ThreadPoolExecutor(1) as other, lock(tmp_path / "out", transfer.OWNER):
        with pytest.raises(InputError, match=f"{tmp_path / 'out'} is being written to by process"):
            other.submit(command, tmp_path, **both).result()
    assert not (tmp_path / "out").exists()


def test_another_store_is_refused_before_rows_are_aligned(tmp_path, data, both, monkeypatch):
    make_store(tmp_path / "scores", data, both["source"])
    command(tmp_path, "--mode", "overlap", **both)
    monkeypatch.setattr(transfer, "TokenBytes", None)
    for more in ((), ("--mode", "overlap", "--fraction", "0.2")):
        with pytest.raises(InputError, match="expected an empty directory or this transfer begun"):
            command(tmp_path, *more, **both)
    with pytest.raises(
        InputError, match="pairs_per_part: expected a whole number of at least 1, got 0"
    ):
        command(tmp_path, "--pairs_per_part", "0", **both)


def test_a_full_disk(tmp_path, data, both):
    """One line, no half of a file; the next one goes on."""
    make_store(tmp_path / "scores", data, both["source"])
    command(tmp_path, **both)
    whole = parts(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    flags = ["--scores", tmp_path / "scores", "--oracle", tmp_path / "oracle"]
    flags += ["--dataset_name", data, "--model_name_or_path", tmp_path / "policy"]
    flags += ["--output_dir", tmp_path / "out"]
    error = cut_short(3000, "transfer", *flags, at="sepo.commands.transfer.transfer_store")
    assert re.search(r"out/part-00000.*: can't be written: .*File too large", error), error
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["manifest.json"]
    command(tmp_path, **both)
    assert parts(tmp_path / "out") == whole


def parts(path):
    return {file.name: file.read_bytes() for file in path.glob("part-*")}


def test_what_an_older_version_began_is_gone_on_with(tmp_path, monkeypatch):
    """Which called the policy's tokenizer otherwise."""
    oracle, policy = chatml_tokenizer(), plain_tokenizer()
    now = tokenizer_hash
    either = lambda one, like=None: of_before(one) if one is policy else now(one, like=like)
    with monkeypatch.context() as patch:
        patch.setattr(transfer, "tokenizer_hash", either)
        _, before, _ = carry(tmp_path, ROWS, oracle, policy, pairs_per_part=1)
    (part := sorted((tmp_path / "out").glob("part-*"))[-1]).unlink()
    data = str(tmp_path / "rows.jsonl")
    transfer_store(
        ScoredStore.open(tmp_path / "scores"), read_pairs(data, policy), read_preferences(data),
        tmp_path / "out", oracle_tokenizer=oracle, policy_tokenizer=policy, **QUIET,
        pairs_per_part=1,
    )  # fmt: skip
    assert part.is_file()
    again = ScoredStore.open(tmp_path / "out", policy)
    assert again.manifest["tokenizer"] == before.manifest["tokenizer"] == of_before(policy)
