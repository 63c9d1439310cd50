"""`sepo transfer` and `sepo report` killed wherever they happen to be, and run again."""

import json
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from scoring_runs import everything, processes
from tokenizers_for_tests import chatml_tokenizer, plain_tokenizer
from transferred_stores import make_store, write

sys.path.append(str(Path(__file__).parents[1] / "report"))
from reports import scored, write_metrics
from reports import write_store as write_scored

from sepo.commands import main as cli
from sepo.data.store.store import ScoredStore, verify_store
from sepo.errors import InputError

__all__ = ["processes"]  # a fixture
WORDS = (
    "the river",
    " is wide",
    "\n  more\tof it",
    " café and cafe\u0301",
    " 🧑🏽‍🔬",
    " hello\r\n",
    ".",
)
KILLS = 24


def work(begun, argv: list[str]) -> None:
    begun.set()
    cli.run(argv)


class Killer:
    """Runs one command again and again, for a random part of the time that all of it takes."""

    def __init__(self, processes, argv: list[str]):
        self._processes, self._argv, self._draw = processes, argv, random.Random(argv[0])
        self._seconds = 0.0

    def run(self) -> None:
        """To the end."""
        process, start = self._begun()
        process.join(60)
        assert process.exitcode == 0
        self._seconds = max(self._seconds, time.monotonic() - start)

    def kill(self, once=None) -> bool:
        """Whether it came before the end; `once`: soon after something is so, else at any time."""
        process, _ = self._begun()
        while once is not None and process.is_alive() and not once():
            time.sleep(0.001)
        time.sleep(self._draw.uniform(0, self._seconds if once is None else self._seconds / 30))
        process.kill()
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL)
        return process.exitcode != 0

    def _begun(self):
        begun = self._processes.Event()
        process = self._processes.Process(target=work, args=(begun, self._argv))
        process.start()
        assert begun.wait(60)
        return process, time.monotonic()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two tokenizers, rows, and what the one's model thought of them."""
    path, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    text = lambda: "".join(draw.choices(WORDS, k=draw.randrange(1, 9)))
    data = write(
        path / "rows.jsonl",
        [
            {"prompt": f"Say {i}:", "chosen": f"{text()}1", "rejected": f"{text()}2"}
            for i in range(60)
        ],
    )
    for name, tokenizer in (("oracle", chatml_tokenizer()), ("policy", plain_tokenizer())):
        tokenizer.save_pretrained(path / name)
    make_store(path / "scores", data, chatml_tokenizer())
    return path


def test_kills_of_transfer(processes, texts, tmp_path, figures):
    """Gone on with after one kill or after several, the store is the same, bit for bit."""
    flags = (
        *("transfer", "--scores", texts / "scores", "--oracle", texts / "oracle"),
        *("--dataset_name", texts / "rows.jsonl", "--model_name_or_path", texts / "policy"),
        *("--pairs_per_part", "2", "--output_dir"),
    )
    argv = lambda name: [*map(str, flags), str(tmp_path / name)]
    Killer(processes, argv("expected")).run()
    expected, found = everything(tmp_path / "expected"), tmp_path / "found"
    killer, killed, half, writing, equal = Killer(processes, argv("found")), 0, 0, 0, 0
    killer.run()
    assert everything(found) == expected
    number = 0
    while killed < KILLS and (number := number + 1) < 4 * KILLS:
        if number % 3:
            clear(found)
        elif (part := next(found.glob("part-*7-of*"), None)) is not None:
            part.unlink()  # work for the next one
        killed += killer.kill((lambda: any(found.glob("part-*"))) if number % 2 else None)
        writing += 0 < len(list(found.glob("part-*"))) < len(expected) - 1
        try:
            ScoredStore.open(found)
            # the manifest is written once more when all parts are there, with what they note
            assert parts(contents(found)) == parts(expected)
            begun, done = (json.loads(x["manifest.json"]) for x in (contents(found), expected))
            at_the_end = {"check", "complete", "tokens", "devices", "precision_check"}
            assert all(done[k] == value for k, value in begun.items() if k not in at_the_end)
        except InputError:
            half += 1
        if number % 3 != 1:
            killer.run()
            assert everything(found) == expected
            equal += 1
    killer.run()  # what the last kill left
    assert everything(found) == expected
    verify_store(found)
    figures("kills of transfer", tried=killed, while_writing=writing, runs_bit_equal=equal)
    assert killed == KILLS and half > 3 and writing > 3


@pytest.mark.parametrize("form", ["html", "json", "png"])
def test_kills_of_report(processes, tmp_path, figures, form):
    """What was there before is there, or what one alone writes; after the next, nothing else."""
    chatml_tokenizer().save_pretrained(tmp_path / "oracle")
    pairs = [scored(str(i), seed=i) for i in range(40)]
    write_scored(tmp_path / "store", pairs, tokenizer_name=str(tmp_path / "oracle"))
    lines = (json.dumps({"step": i, "loss": 1 / i}) for i in range(1, 99))
    write_metrics(tmp_path / "run", *lines)
    out = tmp_path / "out"
    file = out if form == "png" else out / f"page.{form}"
    flags = ("report", tmp_path / "store", "--run", tmp_path / "run", "--format", form, "-o", file)
    killer, killed, new = Killer(processes, [*map(str, flags)]), 0, 0
    killer.run()
    expected = everything(out)
    before = dict.fromkeys(expected, b"before")
    number = 0
    while killed < KILLS // 3 and (number := number + 1) < 8 * KILLS:
        clear(out)
        for name, content in before.items():
            (out / name).write_bytes(content)
        temporary = lambda: any(out.glob(".*.tmp"))
        killed += killer.kill(temporary if number % 3 else None)
        found = contents(out)
        assert found.keys() == expected.keys()
        assert all(found[name] in (before[name], expected[name]) for name in expected)
        new += found == expected
        if number % 2:
            killer.kill()
        killer.run()
        assert everything(out) == expected
    figures("kills of report", tried=killed, pages_equal=number, done_before_the_kill=new)
    assert killed == KILLS // 3


def contents(path: Path) -> dict:
    """Of a store or a folder of figures, whatever a kill left beside them under hidden names."""
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name[0] != "."}


def parts(files: dict) -> dict:
    return {name: content for name, content in files.items() if name.startswith("part-")}


def clear(path: Path) -> None:
    for file in path.iterdir():
        if file.name[0] != ".":
            file.unlink()
