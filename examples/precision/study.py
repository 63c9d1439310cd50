"""How much of a selection a lower precision keeps, and what the policy makes of what it keeps.

    python -m examples.precision.study --output_dir runs/precision

The oracle is the demo's, saved after 5 to 160 steps. Run it again after a kill: what is done is not
done again, and each part's numbers are a line of study.jsonl in the output directory.
"""

import argparse
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, TrainerCallback

from examples.precision import overlap
from sepo.data.read.read import read_pairs
from sepo.data.store.store import ScoredStore
from sepo.data.types import TokenPair
from sepo.demo import DATA
from sepo.demo.evaluate import clustered_mean, kl_per_token
from sepo.demo.judge import sentiment
from sepo.demo.run import ORACLE, POLICY, continue_openings, read_lines, score, train
from sepo.demo.smollm2 import save_smollm2
from sepo.errors import InputError
from sepo.model.load import load_model, load_tokenizer
from sepo.model.prepare import prepare_model
from sepo.score.score import score_dataset
from sepo.trainer.config import SePOConfig
from sepo.trainer.trainer import SePOTrainer

ORACLE_PAIRS = 160  # the demo's: one pass is its 40 steps
POLICY_ORACLE = 40  # steps
SELECTIONS = ("float32", "bfloat16", "random")
FRACTION = POLICY["fraction"]


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    place = args.output_dir
    place.mkdir(parents=True, exist_ok=True)
    rows = Rows(place / "study.jsonl")
    reference = args.model or save_smollm2(place / "model")
    tokenizer = load_tokenizer(str(reference))
    read = lambda name: read_pairs(args.data / name, tokenizer, append_eos=False).pairs
    pairs, heldout = read("pairs.jsonl"), read("heldout.jsonl")[: args.pairs]
    random.Random(0).shuffle(pairs)  # as the demo does

    check_settings(args, rows, reference)
    oracles = {steps: place / f"oracle-{steps}" for steps in sorted(args.steps)}
    train_on = pairs[:ORACLE_PAIRS]
    rows.part(
        {"part": "oracles", "oracle_steps": list(oracles)},
        lambda: train_oracles(oracles, train_on, reference, tokenizer, place / "oracles"),
    )
    for steps, oracle in oracles.items():
        for variant in args.variants:
            measured = (variant, heldout, oracle, reference, place / "logp", FRACTION)
            rows.part(
                {"part": "overlap", "oracle_steps": steps, "variant": variant},
                lambda measured=measured: overlap.measure(*measured),
            )
    if args.seeds:
        study_policies(args, rows, pairs[: args.policy_pairs], oracles, reference, tokenizer)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("runs/precision"))
    add("--data", type=Path, default=DATA)
    add("--model", type=Path, help="directory of the reference; default: SmolLM2-135M-Instruct")
    add("--steps", type=int, nargs="+", default=[5, 10, 20, 40, 80, 160], help="of the oracles")
    known = ("random", *overlap.VARIANTS)
    add("--variants", nargs="+", choices=known, default=known, metavar="V", help="of an overlap")
    add("--pairs", type=int, default=48, help="held-out pairs that are scored in every precision")
    add("--policy_pairs", type=int, default=240, help="pairs that policies are trained on")
    add("--policy_oracle", type=int, default=POLICY_ORACLE, help="steps of the oracle they follow")
    seeds = "of policies and of their samples; none: no policies"
    add("--seeds", type=int, nargs="*", default=[0, 1], help=seeds)
    add("--per_opening", type=int, default=4, help="samples of each held-out opening")
    return parser.parse_args(arguments)


def check_settings(args: argparse.Namespace, rows: "Rows", reference: Path) -> None:
    """The first line says what the others were made with; raises InputError for something else."""
    names = ("pairs", "policy_pairs", "policy_oracle", "per_opening")
    settings = {name: getattr(args, name) for name in names} | {"model": reference.name}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    threads = {"threads": torch.get_num_threads()}
    found = rows.part({"part": "settings"}, lambda: settings | versions | threads)
    for name, value in settings.items():
        if found[name] != value:
            raise InputError(
                f"--{name}: expected {found[name]}, of which {rows.path} is, got {value}; "
                "choose another --output_dir"
            )


class Rows:
    """A file of JSON lines, one a part: a part that has its line is not computed again."""

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows = [json.loads(line) for line in lines]

    def part(self, key: dict, compute: Callable[[], dict]) -> dict:
        for row in self.rows:
            if all(row.get(name) == value for name, value in key.items()):
                return row
        start = time.perf_counter()
        row = key | compute() | {"seconds": round(time.perf_counter() - start, 1)}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
        return row


# The oracles


def train_oracles(
    oracles: dict[int, Path],  # by optimiser steps
    pairs: list[TokenPair],
    reference: Path,
    tokenizer,
    place: Path,
) -> dict:
    """One run of the demo's DPO, saved in float32 on its way. Starts afresh after a kill."""
    shutil.rmtree(place, ignore_errors=True)  # what a killed run left
    cached = score(pairs, place / "reference", tokenizer, reference, keep=["logp"])
    steps_an_epoch = -(-len(pairs) // ORACLE["pairs_per_step"])
    config = SePOConfig(
        output_dir=str(place / "trainer"),
        max_steps=max(oracles),
        # the demo's 5 % of one pass, so that the checkpoint after one pass is its oracle
        warmup_steps=max(1, round(0.05 * steps_an_epoch)),
        lr_scheduler_type="constant_with_warmup",
        max_tokens_per_batch=2048,
        save_strategy="no",
        logging_steps=5,
        use_cpu=True,
        bf16="auto",  # arithmetic only: weights, and so the saved oracles, stay float32
        **ORACLE,
    )
    trainer = SePOTrainer(
        prepare_model(load_model(str(reference))),
        config,
        train_dataset=cached,
        processing_class=tokenizer,
        callbacks=[SaveAt(oracles, tokenizer)],
    )
    trainer.train()
    return {
        "pairs": len(pairs),
        **{name: ORACLE[name] for name in ("beta", "learning_rate", "pairs_per_step")},
    }


class SaveAt(TrainerCallback):
    """Saves the model and its tokenizer after the given numbers of optimiser steps."""

    def __init__(self, places: dict[int, Path], tokenizer):
        self.places, self.tokenizer = places, tokenizer

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if place := self.places.get(state.global_step):
            model.save_pretrained(place)
            self.tokenizer.save_pretrained(place)


# The policies


def study_policies(args, rows: Rows, pairs, oracles, reference: Path, tokenizer) -> None:
    """Train on each selection with each seed; sentiment and distance of their samples."""
    place, oracle = args.output_dir, oracles[args.policy_oracle]
    openings = read_lines(args.data / "heldout_openings.txt")
    found = {}
    for seed in args.seeds:
        for selection in ("reference", *SELECTIONS):
            key = {"part": "policy", "selection": selection, "seed": seed}
            found[selection, seed] = rows.part(
                key,
                lambda key=key: policy(args, key, pairs, oracle, reference, tokenizer, openings),
            )
    for selection in ("reference", *SELECTIONS):
        rows.part(
            {"part": "policies", "selection": selection, "seeds": args.seeds},
            lambda name=selection: pooled(
                *([found[n, seed]["by_opening"] for seed in args.seeds] for n in (name, "float32"))
            ),
        )
    stores = [scored(place, name, pairs, oracle, reference, tokenizer) for name in SELECTIONS[:2]]
    selected = [
        overlap.select([(p.chosen_score, p.rejected_score) for p in store.pairs()], FRACTION)
        for store in stores
    ]
    rows.part(
        {"part": "policy selection", "variant": "bfloat16", "against": "float32"},
        lambda: {"pairs": len(pairs)} | overlap.compare(*selected),
    )


def policy(args, key: dict, pairs, oracle, reference: Path, tokenizer, openings) -> dict:
    """Train one policy, unless it is the reference, and read its samples."""
    place, selection, seed = args.output_dir, key["selection"], key["seed"]
    trained = place / f"policy-{selection}-{seed}"
    if selection == "reference":
        trained = reference
    else:
        how = "sepo-rand" if selection == "random" else "sepo"
        precision = "float32" if selection == "random" else selection
        store = scored(place, precision, pairs, oracle, reference, tokenizer)
        shutil.rmtree(trained, ignore_errors=True)  # what a killed run left
        train(reference, store, trained, tokenizer, seed=seed, **dict(POLICY, method=how))
    load = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
    model = load(trained)
    completions = continue_openings(
        model,
        tokenizer,
        openings,
        per_opening=args.per_opening,
        seed=seed,
        name=f"{selection}, seed {seed}",
    )
    values = np.array([sentiment(c.text) for c in completions]).reshape(len(openings), -1)
    result = estimate("sentiment", values.mean(1)) | {"samples": values.size}
    if selection != "reference":
        kl = kl_per_token(model, load(reference), completions, per_opening=1)
        result |= {"kl_per_token": kl.mean, "kl_per_token_ci95": [kl.low, kl.high]}
    return result | {"by_opening": [round(x, 4) for x in values.mean(1).tolist()]}


def scored(place: Path, precision: str, pairs, oracle, reference, tokenizer) -> ScoredStore:
    """The pairs' scores, with both models in `precision`; made once, resumed after a kill."""
    store = place / f"scored-{precision}"
    load = lambda path: prepare_model(load_model(str(path), dtype=getattr(torch, precision)))
    score_dataset(
        pairs,
        store,
        reference=load(reference),
        oracle=load(oracle),
        tokenizer=tokenizer,
        max_tokens=overlap.MAX_TOKENS,
        shard=(0, 1),
    )
    return ScoredStore.open(store, tokenizer)


def pooled(
    by_opening: list[list[float]],  # seeds x openings
    against: list[list[float]],  # the same of policies trained on exact selections
) -> dict:
    """Mean sentiment over seeds, and its difference from another's, openings as clusters."""
    ours, theirs = np.array(by_opening).mean(0), np.array(against).mean(0)
    # the same openings and random numbers on both sides: their differences vary less than they do
    return estimate("sentiment", ours) | estimate("difference", ours - theirs)


def estimate(name: str, means: np.ndarray) -> dict:
    mean = clustered_mean(means.tolist(), range(len(means)))
    return {name: mean.mean, f"{name}_ci95": [mean.low, mean.high]}


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
