"""Scorers killed wherever they happen to be, with another number of shards each time."""

import random
import signal
import time

import pytest
from scoring_for_tests import QUIET, make_pairs
from scoring_runs import KEPT, MODELS, everything, one_thread, processes, run_and_maybe_die

from sepo.data.store.store import verify_store
from sepo.errors import InputError
from sepo.score.score import score_dataset

__all__ = ["one_thread", "processes"]  # fixtures
NEVER = 1000


def quietly_refused(*arguments) -> None:
    try:
        run_and_maybe_die(*arguments)
    except InputError as error:
        raise SystemExit(2) from error


@pytest.mark.parametrize("kept", KEPT)
def test_kills(processes, tmp_path, figures, kept):
    """What is left is gone on with, and in the end there is nothing but the store, bit for bit."""
    many, keep, draw = make_pairs(60), KEPT[kept], random.Random(kept)
    expected, found = tmp_path / "expected", tmp_path / "found"
    score_dataset(many, expected, keep=keep, **MODELS, **QUIET)
    killed = 0
    for shards in (1, 2, 3, 2, 1, 3, 1, 2):
        start = lambda i, n=shards: processes.Process(
            target=quietly_refused, args=(found, (i, n), NEVER, keep, many)
        )
        running = [start(i) for i in range(shards)]
        before = len(list(found.glob("part*.parquet")))
        for process in running:
            process.start()
        deadline = time.monotonic() + 20
        while len(list(found.glob("part*.parquet"))) == before and time.monotonic() < deadline:
            time.sleep(0.001)
        for process in running:
            time.sleep(draw.uniform(0, 0.01))
            process.kill()
            process.join(60)
            killed += process.exitcode == -signal.SIGKILL
    last = processes.Process(target=quietly_refused, args=(found, (0, 1), NEVER, keep, many))
    last.start()
    last.join(60)
    assert last.exitcode == 0 and killed > 4
    figures("kills of scoring", tried=killed, stores_bit_equal=1)
    assert everything(found) == everything(expected)
    verify_store(found)


def test_many_scorers_of_one_shard(processes, tmp_path, figures):
    """One writes at a time, the others are refused; the store is what one alone makes of it."""
    many, keep = make_pairs(60), KEPT["states"]
    expected, found = tmp_path / "expected", tmp_path / "found"
    score_dataset(many, expected, keep=keep, **MODELS, **QUIET)
    refused = 0
    for _ in range(3):
        running = [
            processes.Process(target=quietly_refused, args=(found, (0, 1), NEVER, keep, many))
            for _ in range(4)
        ]
        for process in running:
            process.start()
        for process in running:
            process.join(60)
        codes = [process.exitcode for process in running]
        assert set(codes) <= {0, 2} and 0 in codes
        refused += codes.count(2)
        assert everything(found) == everything(expected)
    assert refused > 0
    figures("scorers of one shard at once", tried=12, refused=refused)
