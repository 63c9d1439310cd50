"""Draw README's picture from bench/results: whole training steps, TRL's and ours.

    python tools/picture.py            # writes docs/step.svg
    python tools/picture.py --check    # writes nothing; exit code 1 if it would

The bars are of one run: the latest on MACHINE that measured every contender of BARS. Colours are in
the middle of the scale, so that text and bars can be read on a white page and on a dark one.
"""

import argparse
import json
import sys
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PICTURE = ROOT / "docs" / "step.svg"
MACHINE = "intel-r-xeon-r-processor-2-cores"
BARS = {  # a contender of the case "step": what the picture calls it
    "TRL DPO": "TRL DPO",
    "TRL SimPO": "TRL SimPO",
    "dpo, cached reference": "sepo DPO",
    "simpo": "sepo SimPO",
    "sepo 30 %": "sepo SePO, 30 %",
}
MEASURES = {  # a panel: its title, and its number of a row with the digits to show
    "seconds": (lambda row: row["median"], 1),
    "MiB beyond weights, gradients and optimiser": (lambda row: row["peak_bytes"] / 2**20, 0),
}
TEXT, OURS, PEERS = "#757d86", "#2f7fd6", "#9a8c7c"
WIDTH, LEFT, PANEL, BAR, STEP, TOP = (
    800,
    130,
    330,
    18,
    28,
    64,
)  # pixels; PANEL: a panel with its gap


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it would")
    args = parser.parse_args(argv)
    lines = (RESULTS / f"{MACHINE}.jsonl").read_text().splitlines()
    drawn = draw(run_of([json.loads(line) for line in lines]))
    current = PICTURE.exists() and PICTURE.read_text() == drawn
    if args.check or current:
        return int(not current)
    PICTURE.write_text(drawn)
    return 0


def run_of(rows: list[dict]) -> dict[str, dict]:
    """By contender, the rows of the latest run with all of BARS. Raises ValueError for none."""
    runs: dict[str, dict[str, dict]] = {}
    for row in rows:
        here = row.get("case") == "step" and row.get("side", "here") == "here"
        if here and row["status"] == "measured":
            runs.setdefault(row["date"], {})[row["provider"]] = row
    whole = {date: run for date, run in runs.items() if run.keys() >= BARS.keys()}
    if not whole:
        raise ValueError(f"expected a run of {', '.join(BARS)}, got none on {MACHINE}")
    return whole[max(whole)]


def draw(run: dict[str, dict]) -> str:
    """Write the SVG of one run's rows."""
    rows = [run[name] for name in BARS]
    about = rows[0]
    trl = about["setting"][2].rpartition(", ")[2].replace("trl", "TRL")
    height = TOP + len(rows) * STEP + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="{TEXT}">',
        text(0, 18, "One training step of SmolLM2-135M, for each pair", weight=600, size=15),
    ]
    for i, name in enumerate(BARS.values()):
        parts.append(text(LEFT - 8, middle(i), name, anchor="end"))
    for number, (title, (measure, digits)) in enumerate(MEASURES.items()):
        left = LEFT + number * PANEL
        values = [measure(row) for row in rows]
        parts.append(text(left, TOP - 14, title))
        for i, (row, value) in enumerate(zip(rows, values, strict=True)):
            long = round((PANEL - 80) * value / max(values), 1)
            colour = OURS if row["ours"] else PEERS
            parts.append(
                f'<rect x="{left}" y="{TOP + i * STEP}" width="{long}" height="{BAR}" rx="2" '
                f'fill="{colour}"/>'
            )
            parts.append(text(left + long + 6, middle(i), f"{value:,.{digits}f}".replace(",", " ")))
    where = f"{about['machine']}, {about['date'][:10]}; {trl}; {about['setting'][0]}"
    parts += [text(0, height - 6, where, size=11), "</svg>", ""]
    return "\n".join(parts)


def middle(i: int) -> int:
    """Return the baseline of the text beside bar i."""
    return TOP + i * STEP + BAR - 5


def text(x: float, y: float, words: str, *, anchor="start", weight=400, size=13) -> str:
    how = f'text-anchor="{anchor}" ' * (anchor != "start") + f'font-weight="{weight}" ' * (
        weight != 400
    )
    return f'<text x="{x:g}" y="{y:g}" {how}font-size="{size}">{escape(words)}</text>'


if __name__ == "__main__":
    sys.exit(main())
