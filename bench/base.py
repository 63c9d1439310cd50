"""The same cases at another commit: a worktree of it with this bench/, and the two take turns.

    python -m bench.base REV COMMAND...     a Python program in such a worktree: make bench-ops

Both sides are processes of their own, because a library is imported once; they wait for each other, so
that no round of one runs beside a round of the other.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from bench.harness import Job
from sepo.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ("csrc", "setup.py")  # what the extension is made of
MEASURES = ("bench", "python/sepo/cost")  # the same on both sides, FLOP too


@contextmanager
def beside(rev: str, suites: tuple[str, ...], options: dict) -> Iterator[list["Beside"]]:
    """The jobs of both sides, a pair a case. Raises InputError if the commit cannot be measured."""
    commit = _git("rev-parse", "--verify", f"{rev}^{{commit}}")
    options = options | {"data": _data(options["data"])}
    with worktree(commit) as tree:
        with Side(ROOT, suites, options) as here, Side(tree, suites, options) as there:
            found, same = here.jobs(), there.jobs()
            if found != same:  # a suite that the machine has packages for has them for both
                raise InputError(f"expected the cases {found} at {rev}, got {same}")
            yield [Beside(i, *job, here, there, commit) for i, job in enumerate(found)]


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """The commit in a folder of its own, with this bench/ and an extension of its own sources."""
    with tempfile.TemporaryDirectory(prefix="sepo-base-") as folder:
        tree = Path(folder) / "tree"
        _git("worktree", "add", "--detach", str(tree), commit)
        try:
            leave = shutil.ignore_patterns("results", "__pycache__")
            for name in MEASURES:
                shutil.rmtree(tree / name, ignore_errors=True)
                shutil.copytree(ROOT / name, tree / name, ignore=leave)
            (ROOT / "runs").mkdir(exist_ok=True)
            (tree / "runs").symlink_to(ROOT / "runs")  # models that were unpacked there
            _build(tree, commit)
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _build(tree: Path, commit: str) -> None:
    """Copied from here where no source of it differs, which a build would take minutes to show."""
    if not (tree / "csrc").exists():
        return
    differs = _git("diff", "--name-only", commit, "--", *NATIVE)
    differs += _git("ls-files", "--others", "--exclude-standard", "--", *NATIVE)
    built = list((ROOT / "sepo_kernels").glob("_C*.so"))
    if built and not differs:
        for path in built:
            shutil.copy2(path, tree / "sepo_kernels")
        return
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{commit[:12]} does not build: {_last(done.stderr)}")


class Side:
    """A process that serves the jobs of one tree."""

    def __init__(self, tree: Path, suites: tuple[str, ...], options: dict):
        self.tree = tree
        path = os.pathsep.join((str(tree), str(tree / "python")))
        self._said = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "bench/run.py", "--serve", json.dumps([suites, options], default=str)],
            cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True,
            env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip

    def jobs(self) -> list[tuple[str, int]]:
        """Names and rounds, the first thing that it says."""
        return [tuple(job) for job in self._read()]

    def ask(self, what: str, job: int):
        """What the job answers. Raises InputError if the process has ended."""
        with suppress(BrokenPipeError):  # what it said on its way out is what counts
            self._process.stdin.write(json.dumps([what, job]) + "\n")
            self._process.stdin.flush()
        return self._read()

    def _read(self):
        if line := self._process.stdout.readline():
            return json.loads(line)
        self._process.wait()
        self._said.seek(0)
        raise InputError(f"{self.tree} stopped: {_last(self._said.read())}")

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *error) -> None:
        self._process.terminate()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):
                pipe.close()
        self._process.wait()
        self._said.close()


class Beside:
    """One case of both sides, as bench.run.run takes it."""

    def __init__(self, job: int, name: str, rounds: int, here: Side, there: Side, commit: str):
        self.name, self.rounds = name, rounds
        self._job, self._sides, self._commit = job, {"here": here, "base": there}, commit
        self._number, self.legend = 0, ""
        asked = "gate", "ready", "finish"
        self.gate, self.ready, self.finish = (partial(self._ask, what) for what in asked)

    def turn(self) -> None:
        """One round of each; the other one first in the next."""
        self._ask("turn", -1 if self._number % 2 else 1)
        self._number += 1

    def records(self) -> list[dict]:
        return self._records

    def _ask(self, what: str, order: int = 1) -> None:
        """Both sides, one after the other; what they answer are their records so far."""
        found = {side: self._sides[side].ask(what, self._job) for side in [*self._sides][::order]}
        more = {"here": {"side": "here"}, "base": {"side": "base", "commit": self._commit}}
        self._records = [r | more[side] for side in self._sides for r in found[side][0]]
        self.about = found["here"][1]

    def text(self) -> str:
        return side_by_side(self.name, self._records, self._commit)


def side_by_side(name: str, records: list[dict], commit: str) -> str:
    """A line a provider: both medians with their quartiles, and how many times the base takes.

    That is the median over the rounds of the base's time over the one beside it.
    """
    of = lambda side: {r["provider"]: r for r in records if r["side"] == side}
    here, there = of("here"), of("base")
    times = lambda side: f"{f'{side} ms':>10}{'q1':>9}{'q3':>9}"
    lines = [f"\n{name}, beside {commit[:12]}"]
    lines.append(f"{'':34}{times('here')}{times('base')}{'base/here':>11}")
    for provider in here | there:
        pair = here.get(provider), there.get(provider)
        ratio = ""
        if all(row and row["seconds"] for row in pair):
            rounds = zip(*(row["seconds"] for row in pair), strict=False)
            ratio = f"{statistics.median(base / own for own, base in rounds):.3f}"
        ours = any(row and row["ours"] for row in pair)
        reasons = "; ".join(sorted({row["reason"] for row in pair if row and row["reason"]}))
        text = "".join(f"{_times(row):28}" for row in pair) + f"{ratio:>11}"
        lines.append(f"{'>' if ours else ' '} {provider:32}{text}  {reasons}".rstrip())
    return "\n".join(lines)


def _times(row: dict | None) -> str:
    if row is None:
        return f"{'not there':>10}"
    if not row["median"]:
        return f"{row['status']:>10}"
    low, high = row["quartiles"]
    return f"{1e3 * row['median']:10.2f}{1e3 * low:9.2f}{1e3 * high:9.2f}"


def serve(found: list[Job]) -> int:
    """Answer one request a line until the other end closes: [what, job] -> what the job says."""
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer

    def say(answer) -> None:
        reply.write(json.dumps(answer) + "\n")
        reply.flush()

    say([[job.name, job.rounds] for job in found])
    for line in sys.stdin:
        what, number = json.loads(line)
        job = found[number]
        getattr(job, what)()
        say([job.records(), job.about])
    return 0


def _data(asked: Path | None) -> str:
    """The same file for both: what is found by default depends on where a tree lies."""
    from bench.steps.pairs import default_source

    return str((asked or default_source()).resolve())


def _git(*args: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"git {args[0]}: {_last(done.stderr)}")
    return done.stdout.strip()


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]


def main(argv: list[str]) -> int:
    commit = _git("rev-parse", "--verify", f"{argv[0]}^{{commit}}")
    with worktree(commit) as tree:
        env = os.environ | {"PYTHONPATH": os.pathsep.join((str(tree), str(tree / "python")))}
        return subprocess.call([sys.executable, *argv[1:]], cwd=tree, env=env)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
