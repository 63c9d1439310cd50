"""Text for repairing a cut model: what the whole model writes after the training openings.

    python examples/weak_to_strong/sample_texts.py --model runs/smollm2 --out runs/texts.jsonl

Rows are token ids in the pair format. `sepo train --method sft` reads prompt and chosen; rejected is
another sample of the same opening, and only there because a pair needs one. No sample is ranked.
"""

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from sepo.demo.sample import sample
from sepo_kernels.devices import fast_dtype

sys.path.insert(0, str(Path(__file__).parents[1] / "sentiment"))
from openings import training_openings  # noqa: E402  the directory is no package


def main() -> None:
    args = parse_args()
    # a decoding step waits for weights, and these are texts to learn from, not scores
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=fast_dtype("cpu"))
    openings = training_openings()[: args.limit]
    with tqdm(total=len(openings) * args.samples, unit="sample") as bar:
        completions = sample(
            model,
            AutoTokenizer.from_pretrained(args.model),
            openings,
            per_opening=args.samples,
            max_new_tokens=args.tokens,
            seed=args.seed,
            batch_size=128,
            progress=lambda done, _: bar.update(done - bar.n),
        )
    groups = [completions[i : i + args.samples] for i in range(0, len(completions), args.samples)]
    rows = [
        {"prompt_ids": one.prompt_ids, "chosen_ids": one.ids, "rejected_ids": other.ids}
        for group in groups
        for one, other in zip(group, group[1:] + group[:1], strict=True)
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{args.out}: {len(rows)} texts of {len(openings)} openings")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="hub id or local path")
    add("--out", type=Path, required=True)
    add("--samples", type=int, default=3, help="continuations per opening, at least 2")
    add("--tokens", type=int, default=40, help="tokens per continuation")
    add("--seed", type=int, default=7, help="not that of the pairs, which are samples too")
    add("--limit", type=int, default=None, help="openings, for a quick look")
    return parser.parse_args()


if __name__ == "__main__":
    main()
