"""Make preference pairs about the sentiment of movie reviews, with a model and a lexicon alone.

For every opening the model samples a few continuations; the judge's highest and lowest become
`chosen` and `rejected`. Rows are TRL preference rows of plain strings. Writes into --out:

    pairs.jsonl            pairs of the training openings
    heldout.jsonl          pairs of the held-out openings
    heldout_openings.txt   every held-out opening, for fresh samples of a trained policy

    python examples/sentiment/make_pairs.py            # 672 openings x 4 samples
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path

from openings import held_out_openings, training_openings
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from sepo.demo import DATA
from sepo.demo.judge import sentiment
from sepo.demo.sample import Completion, end_tokens, sample
from sepo.demo.smollm2 import save_smollm2


def main() -> None:
    args = parse_args()
    model_dir = save_smollm2(args.model)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    args.out.mkdir(parents=True, exist_ok=True)
    held_out = held_out_openings()[: args.limit]
    splits = [
        ("pairs", training_openings()[: args.limit], args.seed),
        ("heldout", held_out, args.seed + 1),
    ]
    for name, openings, seed in splits:
        started = time.monotonic()
        with tqdm(total=len(openings) * args.samples, desc=name, unit="sample") as bar:
            completions = sample(
                model,
                tokenizer,
                openings,
                per_opening=args.samples,
                max_new_tokens=args.tokens,
                temperature=args.temperature,
                seed=seed,
                batch_size=args.batch_size,
                progress=lambda done, _, bar=bar: bar.update(done - bar.n),
            )
        rows, counts = make_rows(name, openings, completions, tokenizer, args.min_gap)
        write_jsonl(args.out / f"{name}.jsonl", rows)
        print(f"{name}: {len(rows)} pairs in {time.monotonic() - started:.0f} s, {dict(counts)}")
    (args.out / "heldout_openings.txt").write_text("\n".join(held_out) + "\n", encoding="utf-8")


def make_rows(
    name: str,
    openings: list[str],
    completions: list[Completion],
    tokenizer: PreTrainedTokenizerBase,
    min_gap: float,  # in units of the judge, compound scores from -1 to 1
) -> tuple[list[dict], Counter]:
    """One row for every opening whose best and worst clean sample differ enough, and the counts."""
    counts = Counter(openings=len(openings), samples=len(completions))
    by_opening: dict[int, list[str]] = {}
    for completion in completions:
        fault = unclean(openings[completion.opening], completion, tokenizer)
        counts[f"samples dropped: {fault}"] += fault is not None
        if fault is None:
            by_opening.setdefault(completion.opening, []).append(completion.text)
    rows = []
    for number, opening in enumerate(openings):
        ranked = sorted((sentiment(text), text) for text in by_opening.get(number, []))
        if len(ranked) < 2 or ranked[-1][0] - ranked[0][0] < min_gap:
            counts["openings skipped: too few samples or too small a gap"] += 1
            continue
        (rejected_reward, rejected), (chosen_reward, chosen) = ranked[0], ranked[-1]
        rows.append(
            {
                "id": f"{name}-{number:03d}",
                "prompt": opening,
                "chosen": chosen,
                "rejected": rejected,
                "chosen_reward": chosen_reward,
                "rejected_reward": rejected_reward,
            }
        )
    return rows, +counts


def unclean(opening: str, completion: Completion, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why a sample cannot become a plain string of a row, or None if it can."""
    if completion.ids[-1] in end_tokens(tokenizer):
        # A plain string has no place for the end token, and without it the text was never sampled.
        return "ended early"
    if "\ufffd" in completion.text:
        return "broken unicode"
    if not completion.text.startswith(" ") or not completion.text.strip():
        return "does not begin with a space"
    ids = tokenizer(opening + completion.text, add_special_tokens=False)["input_ids"]
    if ids != completion.prompt_ids + completion.ids:
        return "tokenises differently"
    return None


def write_jsonl(path: Path, rows: list[dict]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, default="runs/smollm2", help="checkpoint, made if it is missing")
    add("--out", type=Path, default=DATA, help="directory to write to")
    add("--samples", type=int, default=4, help="continuations per opening")
    add("--tokens", type=int, default=40, help="tokens per continuation")
    add("--temperature", type=float, default=1.0)
    add("--min-gap", type=float, default=0.5, help="least difference of the two rewards, of 2")
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=128)
    add("--limit", type=int, default=None, help="openings per split, for a quick look")
    return parser.parse_args()


if __name__ == "__main__":
    main()
