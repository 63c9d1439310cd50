"""Time, memory and error of what this project replaces and of what it does instead.

    python bench/run.py                     a correctness gate, then one case of each suite,
                                            in the dtype that the machine multiplies fastest,
                                            and last the hours of an epoch by each trainer
    python bench/run.py --suite head        head | select | attention | score | step | full
    python bench/run.py --case 'head-bf16-*' --providers sepo cce
    python bench/run.py --case head-bf16-30 --base main    here and at another commit, in turn

Nothing is timed before every case has passed its gate, and nothing at all if one of ours has not.
All contenders of a case take turns. Rows are appended to bench/results/<machine>.jsonl.
Exit status: 0 all is well, 1 one of ours is wrong or nothing was measured, 2 a wrong argument.
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a program: its own folder is no place to import from
    sys.path[:1] = [str(ROOT), str(ROOT / "python")]

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells of itself in every table
from bench import base, figure, jobs, precision, report  # noqa: E402
from bench.harness import device_here  # noqa: E402
from sepo.commands import main as cli  # noqa: E402
from sepo.errors import InputError  # noqa: E402

SHORT_MINUTES = 3.25  # of a run without arguments: four, with the imports and a last round
LEAST_ROUNDS = 2  # of every case, whatever the clock says: a slow machine takes longer


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    warnings.filterwarnings("ignore")  # the peers', and none of our business
    try:
        if args.plan or args.hours:
            now = "plan", str(args.plan or "--papers")
            print(f"bench: this is now: sepo {' '.join(now)}", file=sys.stderr)
            return cli.run([*now]) or 0
        if args.serve:
            suites, options = args.serve
            options["data"] = options["data"] and Path(options["data"])
            return base.serve(jobs.jobs(tuple(suites), **options))
        options = dict(
            device=args.device, cases=tuple(args.case), providers=tuple(args.providers),
            rounds=args.rounds, model=args.model, data=args.data, pairs=args.pairs,
            max_length=args.max_length, dtype=args.dtype,
        )  # fmt: skip
        if args.dtype == "auto":  # told once, so that the other side of --base takes the same
            options["dtype"] = str(precision.fast(args.device)).removeprefix("torch.")
        return measure(args, options)
    except InputError as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    found = argparse.ArgumentParser("bench/run.py", description=__doc__, formatter_class=raw)
    add = found.add_argument
    add("--suite", nargs="+", default=[], choices=(*jobs.SUITES, jobs.FULL))
    add("--case", nargs="+", default=[], help="patterns of names, long cases too")
    add("--providers", nargs="+", default=[], help="patterns of names or groups")
    add("--json", type=Path, help="append rows to this file; -: print them, tables on stderr")
    add("--figure", type=Path, help="default runs/bench/<machine>.svg; none: no figure")
    add("--base", metavar="REV", help="the same cases at another commit, side by side")
    add("--plan", type=Path, metavar="CONFIG", help="now: sepo plan CONFIG")
    add("--hours", action="store_true", help="now: sepo plan --papers")
    add("--device", default=device_here(), choices=("cpu", "cuda"))
    add("--rounds", type=int)
    add(
        "--minutes",
        type=float,
        help=f"no round after, but {LEAST_ROUNDS} a case; {SHORT_MINUTES} without arguments",
    )
    add = found.add_argument_group("whole steps").add_argument
    add("--model", help="smollm2, smollm2-shape, llama-1b-shape, a directory, a hub id")
    add("--data", type=Path, help="default: runs/data/dpo_en_demo.json, or pairs as long of ours")
    add("--pairs", type=int, help="of one step")
    add("--max_length", type=int, help="tokens of a prompt and one response")
    kinds = "auto", "float32", "bfloat16"
    add("--dtype", default="auto", choices=kinds, help="of all; auto: what is fastest here")
    add("--float32", action="store_const", dest="dtype", const="float32")
    add("--serve", type=json.loads, help=argparse.SUPPRESS)  # base.py's other end
    return found


def measure(args: argparse.Namespace, options: dict) -> int:
    suites, start = tuple(args.suite), time.monotonic()
    minutes = args.minutes
    if minutes is None and not (suites or args.case or args.base):
        minutes = SHORT_MINUTES
    deadline = None if minutes is None else start + 60 * minutes
    for_files = str(args.json) == "-"
    tell = lambda text: print(text, file=sys.stderr if for_files else sys.stdout, flush=True)
    about = report.surroundings(args.device)
    tell(f"{about['machine']}, {about['threads']} threads, {about['commit']}")
    tell(", ".join(f"{name} {version}" for name, version in about["versions"].items()))
    for suite in jobs.SUITES if not suites or jobs.FULL in suites else suites:
        if reason := jobs.lacking(suite):
            tell(f"{suite} is left out: {reason}")
    path = args.json or report.default_path(args.device)

    def keep(records: list[dict], more: dict) -> None:
        if for_files:
            for found in records:
                print(json.dumps(about | more | found))
        else:
            report.append(records, path, about | more)

    alone = lambda: nullcontext(jobs.jobs(suites, **options))
    with base.beside(args.base, suites, options) if args.base else alone() as entries:
        records, code = run(entries, tell=tell, keep=keep, deadline=deadline)
    if code == 0 and not (suites or args.case or args.providers or args.base):
        if not jobs.lacking("step"):
            tell("\n" + hours_of_an_epoch(entries, about["machine"]))
    if code == 0 and str(args.figure) != "none":
        usual = f"{report.default_path(args.device).stem}.svg"
        picture = args.figure or ROOT / "runs" / "bench" / usual
        figure.draw(records, picture, title=f"{about['machine']}, {report.short(about['commit'])}")
        tell(f"\n{'' if for_files else f'rows: {path}; '}figure: {picture}")
    tell(f"{time.monotonic() - start:.0f} s")
    return code


def hours_of_an_epoch(entries: Sequence, machine: str) -> str:
    """The comparison of GPU-hours, from this run's step and from the cost model."""
    from sepo.cost import epochs  # needs transformers, which the operations do not

    steps = [job for job in entries if job.suite == "step" and "reference_seconds" in job.about]
    if not steps:
        return epochs.table(None)
    seconds = {row.contender: row.median for row in steps[0].rows if row.median}
    about = steps[0].about
    what = f"{about['model']}, pairs of at most {about['max_length']} tokens, on {machine}"
    return epochs.table(epochs.Measured(what, seconds, about["reference_seconds"]))


def run(
    entries: Sequence,  # harness.Job, or base.Beside
    *,
    tell: Callable[[str], None] = print,
    keep: Callable[[list[dict], dict], None] = lambda records, about: None,
    deadline: float | None = None,  # on the monotonic clock
) -> tuple[list[dict], int]:  # records of all rows, exit status
    """All gates, then all rounds; records are kept a case at a time."""
    gates, red = [], False
    is_ours = lambda record: record["ours"] and record.get("side", "here") == "here"
    for entry in entries:
        entry.gate()
        gates.append(found := entry.records())
        wrong = [r for r in found if r["status"] == "refused"]
        red |= any(map(is_ours, wrong))
        passed = sum(r["status"] == "passed" for r in found)
        tell(f"gate {entry.name}: {passed} of {len(found)} pass")
        for r in wrong:
            tell(f"  {r['provider']} is refused: {r['reason']}")
    if red:
        for found in gates:
            keep(found, {})
        tell("the gate is red: nothing is timed")
        return [r for found in gates for r in found], 1
    for legend in dict.fromkeys(entry.legend for entry in entries if entry.legend):
        tell(legend)
    records = []
    for entry in entries:
        entry.ready()
        for number in range(entry.rounds):
            if deadline is not None and number >= LEAST_ROUNDS and time.monotonic() > deadline:
                break
            entry.turn()
        entry.finish()
        keep(found := entry.records(), entry.about)
        records += found
        tell(entry.text())
    # unless peers alone were asked for, a run without ours has said nothing
    due = [r for r in records if r["ours"]] or records
    failed = any(r["status"] == "refused" and is_ours(r) for r in records)  # after its gate
    return records, 0 if any(r["status"] == "measured" for r in due) and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
