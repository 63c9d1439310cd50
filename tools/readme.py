"""Make the tables of docs/benchmarks.md from bench/results: `python -m tools.readme`; --check compares.

A block begins with <!-- bench:TABLE MACHINE --> and ends with <!-- /bench -->; MACHINE names a file of
bench/results. A table tells of one run: the latest of those that measured most of its contenders.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from textwrap import fill

from bench.report import RESULTS, ROOT, short
from sepo.errors import InputError

PAGE = ROOT / "docs" / "benchmarks.md"
BLOCK = re.compile(
    r"(<!-- bench:(?P<table>[\w-]+) (?P<machine>[\w-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL
)
COLUMNS = 100  # of a page's text
KINDS = {"bf16": "bfloat16", "fp32": "float32"}  # as the cases' names have them
HEAD = {  # provider: what the page calls it
    "sepo": "**sepo**",
    "cce": "{version} (`{impl}`), gathered rows",
    "torch_lce": "`F.linear_cross_entropy` ({version}), gathered rows",
    "dense_gathered": "gathered rows, log-softmax",
    "liger_simpo": "{version} SimPO loss, all tokens",
    "dense": "dense log-softmax, all tokens",
}
STEP = {
    "TRL DPO, checkpointing": "{trl} DPO, gradient checkpointing (its default)",
    "TRL DPO": "{trl} DPO",
    "TRL SimPO": "{trl} SimPO",
    "dpo, cached reference": "**sepo** DPO, cached reference ({reference:.1f} s a pair, once)",
    "simpo": "**sepo** SimPO",
    "sepo 30 %": "**sepo** SePO, 30 %",
    "sepo 30 %, checkpointing": "**sepo** SePO, 30 %, gradient checkpointing",
}


PLAIN, TRL = ("dense_gathered", "softmax_both_gathered"), ("trl", "trl_divergence")
OPERATIONS = {  # case: what the page calls it
    "head-{}-30": "log-probabilities",
    "stats-{}-30": "and entropy, log Σp², mean logit, lse, top-1",
    "stats-entropy-{}-30": "and the entropy's gradient",
    "high-entropy-{}": "of all rows the fifth with the highest entropy",
    "k20-{}-30": "of 20 targets a row",
    "k20-over-targets-{}-30": "of 20 targets, normalised over these",
    "kl-{}-ref-policy": "of two heads, and KL(ref ‖ policy)",
    "kl-{}-policy-ref": "of two heads, and KL(policy ‖ ref)",
    "kl-{}-jsd": "of two heads, and their JSD",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it would")
    args = parser.parse_args(argv)
    text = PAGE.read_text()
    current = rewritten(text)
    if args.check or text == current:
        return int(text != current)
    PAGE.write_text(current)
    return 0


def rewritten(text: str, results: Path = RESULTS) -> str:
    """The text with every block made again. Raises InputError for a table that cannot be made."""

    def block(found: re.Match) -> str:
        name, path = found["table"], results / f"{found['machine']}.jsonl"
        if name not in TABLES:
            raise InputError(f"expected a table of {', '.join(TABLES)}, got {name}")
        if not path.exists():
            raise InputError(f"{path} is not there")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return f"{found[1]}{TABLES[name](rows)}\n{found[4]}"

    return BLOCK.sub(block, text)


def head_table(rows: list[dict], kind: str) -> str:
    """A head, 30 % of the rows selected."""
    found, when = _run(rows, f"head-{kind}-30", [*HEAD, "gemm"])
    shape, gemm = found["sepo"]["shape"], found["gemm"]
    where = gemm["note"].partition(" bare products")[2]  # " in float32", of a bfloat16 head
    about = (
        f"A {KINDS[kind]} head of {_thousands(shape['V'])} words of width {shape['D']}, forward and "
        f"backward, {shape['M']} of {shape['N']} tokens selected; {when}. GEMMs: its three bare "
        f"products{where}, {1e3 * gemm['median']:.0f} ms."
    )
    lines = [
        fill(about, COLUMNS),
        "",
        "| | time / GEMMs | quartiles, ms | memory beyond inputs, MiB | error of logp, nats |",
        "|---|---|---|---|---|",
    ]
    for name, words in HEAD.items():
        if (row := found.get(name)) is None:
            continue
        impl = row["note"].replace('"', "").removeprefix("impl=")
        named = words.format(version=row["version"], impl=impl)
        low, high = (1e3 * x for x in row["quartiles"])
        error = f"{row['errors']['logp']:.0e}" if "logp" in row["errors"] else "–"
        cells = named, f"{row['times_gemm']:.2f}", f"{low:.0f}–{high:.0f}"
        lines.append(_line(*cells, f"{row['extra_bytes'] / 2**20:.0f}", error.replace("e-0", "e-")))
    return "\n".join(lines)


def operations_table(rows: list[dict], kind: str) -> str:
    """What the head gives beside log-probabilities, and what others take for it."""
    lines = [
        "| | sepo, ms | GEMMs | gathered rows, softmax / sepo | TRL / sepo | largest error of a value: sepo, TRL |",
        "|---|---|---|---|---|---|",
    ]
    for case, words in OPERATIONS.items():
        case = case.format(kind).replace("kl-bf16", "kl")  # the cases of bfloat16 KLs don't name it
        found, when = _run(rows, case, ["sepo", "gemm", *PLAIN, *TRL])
        ours, (plain, trl) = found["sepo"], ([found.get(n) for n in x] for x in (PLAIN, TRL))
        plain, trl = (next(filter(None, them), None) for them in (plain, trl))
        share = lambda row, ours=ours: (
            "" if row is None else f"{row['median'] / ours['median']:.2f}"
        )
        both = (ours if trl is None else trl)[
            "errors"
        ]  # TRL's divergence gives no log-probabilities
        worst = [_worst_value(row, both) for row in (ours, trl) if row is not None]
        lines.append(
            _line(
                words, f"{1e3 * ours['median']:.0f}", f"{ours['times_gemm']:.2f} of "
                f"{found['gemm']['note'].partition(' ')[0]}", share(plain), share(trl),
                ", ".join(worst),
            )
        )  # fmt: skip
    shape = ours["shape"]
    about = (
        f"{KINDS[kind].capitalize()}, forward and backward, {_thousands(shape['V'])} words of width "
        f"{shape['D']}; {when}. GEMMs: the time over the bare products that the work needs."
    )
    return "\n".join([fill(about, COLUMNS), "", *lines])


def _worst_value(row: dict, names: Collection[str]) -> str:
    errors = row["errors"]
    found = max(errors[name] for name in names if name in errors and "grad" not in name)
    return f"{found:.0e}".replace("e-0", "e-")


def step_table(rows: list[dict]) -> str:
    """A whole step of a pair, beside TRL's."""
    found, when = _run(rows, "step", STEP)
    one = found["sepo 30 %"]
    of = f", {one['data']} cut to {one['max_length']} tokens" if "data" in one else ""
    about = f"{one['model']}, {one['pairs']} pairs a step{of}, {one['setting'][0]}; {when}. Of each pair:"
    lines = [
        fill(about, COLUMNS),
        "",
        "| | tokens | rows of the head | seconds | quartiles | MiB beyond weights, gradients, AdamW |",
        "|---|---|---|---|---|---|",
    ]
    for name, words in STEP.items():
        if (row := found.get(name)) is None:
            continue
        low, high = row["quartiles"]
        again = ", and the reference's" if row["note"].endswith("by the reference") else ""
        trl = row["setting"][2].rpartition(", ")[2].replace("trl", "TRL")
        named = words.format(trl=trl, reference=row["reference_seconds"])
        lines.append(
            _line(
                named, f"{_thousands(row['tokens'])}{again}", _thousands(row["rows"]),
                f"{row['median']:.2f}", f"{low:.2f}–{high:.2f}", _thousands(row["peak_bytes"] / 2**20),
            )
        )  # fmt: skip
    return "\n".join(lines)


TABLES: dict[str, Callable[[list[dict]], str]] = {
    "head": partial(head_table, kind="bf16"),
    "head-fp32": partial(head_table, kind="fp32"),
    "operations": partial(operations_table, kind="bf16"),
    "operations-fp32": partial(operations_table, kind="fp32"),
    "step": step_table,
}


def _run(rows: list[dict], case: str, names) -> tuple[dict[str, dict], str]:
    """By contender, the rows of the one run that measured most of them, the latest of such; its name."""
    runs: dict[str, dict[str, dict]] = {}
    for row in rows:
        here = row.get("case") == case and row.get("side", "here") == "here"
        if here and row["status"] == "measured" and row["provider"] in names:
            runs.setdefault(row["date"], {})[row["provider"]] = row
    runs = {date: run for date, run in runs.items() if any(row["ours"] for row in run.values())}
    if not runs:
        raise InputError(f"no run of {case} has measured ours")
    date, found = max(runs.items(), key=lambda item: (len(item[1]), item[0]))
    about = next(iter(found.values()))
    return found, f"{about['machine']}, {date[:10]}, {short(about['commit'])}"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _thousands(number: float) -> str:
    return f"{number:,.0f}".replace(",", " ") if number >= 1e4 else f"{number:.0f}"


if __name__ == "__main__":
    sys.exit(main())
