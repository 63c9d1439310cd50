"""Whatever happens to the processes that fill a store, its parts come out the same."""

import random
import re
import signal
import time

import numpy as np
import pytest
from scoring_for_tests import ORACLE, QUIET, REFERENCE, make_pairs, make_tokenizer, parts
from scoring_runs import (
    KEPT,
    MODELS,
    everything,
    of_before,
    one_thread,
    processes,
    run_and_maybe_die,
)
from tiny import tiny_model

from sepo.data.store import part, store
from sepo.data.store.store import ScoredStore
from sepo.errors import InputError
from sepo.model.prepare import prepare_model
from sepo.score import score
from sepo.score.score import score_dataset

__all__ = ["one_thread", "processes"]  # fixtures


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run of one process."""
    path = tmp_path_factory.mktemp("whole")
    return score_dataset(make_pairs(), path, reference=REFERENCE, oracle=ORACLE, **QUIET)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_shards_in_any_order_make_the_same_parts(whole, tmp_path, order):
    run = lambda i: score_dataset(
        make_pairs(), tmp_path, reference=REFERENCE, oracle=ORACLE, shard=(i, 2), **QUIET
    )
    run(order[0])
    with pytest.raises(InputError, match="of 5 parts are missing"):
        ScoredStore.open(tmp_path)
    run(order[1])
    assert parts(tmp_path) == parts(whole)
    assert (tmp_path / "manifest.json").read_text() == (whole / "manifest.json").read_text()


def test_shard_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    score_dataset(make_pairs(), tmp_path, reference=REFERENCE, oracle=ORACLE, **QUIET)
    assert [name[:10] for name in parts(tmp_path)] == ["part-00001", "part-00004"]


def test_a_second_run_does_only_what_is_missing(whole, tmp_path, monkeypatch):
    run = lambda: score_dataset(make_pairs(), tmp_path, reference=REFERENCE, oracle=ORACLE, **QUIET)
    run()
    (tmp_path / "part-00003-of-00005.parquet").unlink()
    calls = []
    of = score._with_scores
    monkeypatch.setattr(score, "_with_scores", lambda p, *a: calls.append(p) or of(p, *a))
    run(), run()
    assert [[p.id for p in block] for block in calls] == [["r6", "r7"]]
    assert parts(tmp_path) == parts(whole)


DEATHS = {  # of each run, numbered as above: manifest, [head, [rows,] part, [rows,] part, ...
    "scores": (0, 1, 0, 2, 1, 3, 0),
    "states": (0, 1, 0, 1, 0, 1, 2, 3, 2, 1, 3, 0),
}


@pytest.mark.parametrize("kept", KEPT)
def test_killed_at_every_rename(processes, tmp_path, kept):
    """Each run gets one rename further, so the deaths fall before and after every file."""
    expected, found, never = tmp_path / "expected", tmp_path / "found", 1000
    score_dataset(make_pairs(), expected, keep=KEPT[kept], **MODELS, **QUIET)
    for step in (*DEATHS[kept], never):
        process = processes.Process(
            target=run_and_maybe_die, args=(found, (0, 1), step, KEPT[kept])
        )
        process.start()
        process.join(60)
        assert process.exitcode == (0 if step == never else -signal.SIGKILL)
    assert everything(found) == everything(expected)


@pytest.mark.parametrize("kept", KEPT)
def test_killed_at_random_moments(processes, tmp_path, kept):
    """Two shards at once, killed again and again wherever they happen to be, then finished."""
    many, keep = make_pairs(60), KEPT[kept]
    expected = tmp_path / "expected"
    score_dataset(many, expected, keep=keep, **MODELS, **QUIET)
    found, draw, progress = tmp_path / "found", random.Random(0), [0]
    arguments = lambda i: (found, (i, 2), 1000, keep, many)
    start = lambda i: processes.Process(target=run_and_maybe_die, args=arguments(i))
    while progress[-1] < 20 and len(progress) < 20:
        running = [start(0), start(1)]
        for process in running:
            process.start()
        deadline = time.monotonic() + 20
        while (
            len(list(found.glob("part*.parquet"))) == progress[-1] and time.monotonic() < deadline
        ):
            time.sleep(0.001)
        for process in running:
            time.sleep(draw.uniform(0, 0.03))
            process.kill()
            process.join(60)
        progress.append(len(list(found.glob("part*.parquet"))))
    assert len(progress) > 2 and not (found / "manifest.json").read_text().count("true")
    for process in [start(0), start(1)]:
        process.start()
        process.join(60)
        assert process.exitcode == 0
    assert everything(found) == everything(expected)


def test_another_run_in_the_directory(tmp_path):
    run = lambda **kw: score_dataset(
        **{
            **dict(pairs=make_pairs(), output_dir=tmp_path, reference=REFERENCE, oracle=ORACLE),
            **QUIET,
            **kw,
        }
    )
    run()
    before = parts(tmp_path)
    other = prepare_model(tiny_model(seed=5))
    for change, words in (
        (dict(oracle=other), "oracle weights"),
        (dict(reference=other), "reference weights"),
        (dict(pairs=make_pairs(seed=2)), "data"),
        (dict(tokenizer=make_tokenizer(3)), "tokenizer"),
        (dict(keep=("score", "logp")), "kept columns"),
        (dict(pairs_per_part=3), "pairs per part"),
    ):
        with pytest.raises(InputError, match=f"holds a store with another {words}"):
            run(**change)
    assert parts(tmp_path) == before


def test_what_an_older_version_began_is_gone_on_with(tmp_path, monkeypatch, whole, caplog):
    """It wrote no checksums, and called the tokenizer otherwise."""
    run = lambda **kw: score_dataset(make_pairs(), tmp_path, **MODELS, **{**QUIET, **kw})
    with monkeypatch.context() as patch:
        patch.setattr(score, "tokenizer_hash", of_before)
        patch.setattr(part, "_check_of", lambda *_: None)
        patch.setattr(store, "sealed", lambda manifest: manifest)
        run(shard=(0, 2))
    begun = {file: file.read_bytes() for file in tmp_path.glob("part-*")}
    assert len(begun) == 3
    with pytest.raises(InputError, match="another tokenizer .*; choose another directory, or del"):
        run(tokenizer=make_tokenizer(3))
    run()
    assert all(file.read_bytes() == content for file, content in begun.items())
    again, expected = ScoredStore.open(tmp_path, QUIET["tokenizer"]), ScoredStore.open(whole)
    assert "3 of 5 parts have no checksums" in caplog.text
    for found, one in zip(again.pairs(), expected.pairs(), strict=True):
        assert found.id == one.id
        assert np.array_equal(found.chosen_score, one.chosen_score)


def test_what_an_older_version_began_with_other_weights_is_refused_in_full(tmp_path):
    """One line: what lies there, what this run is, and what to do."""
    run = lambda **kw: score_dataset(make_pairs(), tmp_path, **{**MODELS, **kw}, **QUIET)
    run(shard=(0, 2))
    with pytest.raises(InputError) as refused:
        run(oracle=prepare_model(tiny_model(seed=5)))
    line = r"holds a store with another oracle weights \([0-9a-f]{32}, this run: [0-9a-f]{32}\); "
    assert re.search(line + "choose another directory, or delete this one", str(refused.value))
