"""What both kinds of weak-to-strong share: stages that are done once, and how they are compared.

A stage is one `sepo` command (printed, so that it can be copied) or one measurement. What it makes
appears under its name only when it is whole; a run that was killed goes on with the next one.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sepo.data.segments import make_segments
from sepo.data.selection import Selection
from sepo.data.store.store import ScoredStore
from sepo.demo import DATA
from sepo.demo.evaluate import clustered_mean, kl_per_token, response_logp
from sepo.demo.judge import sentiment
from sepo.demo.lexicon import in_lexicon
from sepo.demo.sample import sample
from sepo_kernels.devices import fast_dtype

FRACTION, SEED = 0.3, 0
FILMS_PER_TEMPLATE = 12  # consecutive openings that differ by their film alone

COMMON = """--lr_scheduler_type constant_with_warmup --max_tokens_per_batch 2048 --append_eos false
    --save_strategy no --logging_steps 5 --bf16 auto --disable_tqdm true"""
ORACLE = "--method dpo --beta 0.1 --learning_rate 5e-6 --num_train_epochs 1 --pairs_per_step 4"
POLICY = f"""--fraction {FRACTION} --gamma 2 --margin 0.5 --learning_rate 2e-5 --num_train_epochs 1
    --pairs_per_step 12 --seed {SEED}"""


class Stages:
    """Stages below one directory."""

    def __init__(self, place: Path, model: Path):
        self.place, self.model = place, model
        place.mkdir(parents=True, exist_ok=True)

    def make(self, name: str, write: Callable[[Path], object], *, resumable: bool = False) -> Path:
        """The path `name`, written to another name first unless it is there already."""
        done = self.place / name
        if not done.exists():
            unfinished = self.place / f"unfinished-{name}"
            if unfinished.is_dir() and not resumable:
                shutil.rmtree(unfinished)
            print(f"\n== {name}", flush=True)
            write(unfinished)
            os.replace(unfinished, done)
        return done

    def train(self, name: str, model: Path, data: Path, options: str) -> Path:
        """`sepo train` of a fresh copy of `model`."""
        command = f"train --model_name_or_path {model} --dataset_name {data} {options} {COMMON}"
        return self.make(name, lambda out: sepo(f"{command} --output_dir {out}"))

    def score(self, name: str, data: Path, reference: Path, options: str) -> Path:
        """`sepo score`, in float32; what a killed one has scored is kept."""
        command = f"score --dataset_name {data} --reference {reference} {options}"
        command += " --append_eos false --max_tokens_per_batch 1024"
        return self.make(name, lambda out: sepo(f"{command} --output_dir {out}"), resumable=True)

    def measure(self, name: str, measure: Callable[[], dict]) -> dict:
        write = lambda out: out.write_text(json.dumps(measure(), indent=1) + "\n")
        return json.loads(self.make(f"{name}.json", write).read_text())

    # The stages that both kinds have

    def halves(self) -> tuple[Path, Path]:
        """Sets A and B: the pairs of every second template of openings, no film review in both."""
        rows = [json.loads(line) for line in (DATA / "pairs.jsonl").read_text().splitlines()]
        # an id counts the openings, those without a pair included
        template = lambda row: int(row["id"].removeprefix("pairs-")) // FILMS_PER_TEMPLATE

        def write(half: int) -> Callable[[Path], object]:
            lines = [json.dumps(row) + "\n" for row in rows if template(row) % 2 == half]
            return lambda out: out.write_text("".join(lines))

        return self.make("a.jsonl", write(0)), self.make("b.jsonl", write(1))

    def oracle(self, name: str, reference: Path, data: Path) -> Path:
        """DPO of `reference` on `data`, the reference's log-probabilities cached."""
        cached = self.score(f"reference-of-{name}", data, reference, "--keep logp")
        return self.train(f"oracle-{name}", reference, cached, ORACLE)

    def selection(self, name: str, oracle: Path, reference: Path, pairs: Path) -> dict[str, Path]:
        """What the oracle thinks of set B and of the held-out pairs: the two scored stores."""
        data = {"b": pairs, "heldout": DATA / "heldout.jsonl"}
        how = f"--oracle {oracle}"
        return {k: self.score(f"{k}-by-{name}", v, reference, how) for k, v in data.items()}

    def policy(self, name: str, store: Path, method: str = "sepo") -> Path:
        return self.train(f"policy-{name}", self.model, store, f"--method {method} {POLICY}")

    def evaluation(self, name: str, policy: Path) -> dict:
        return self.measure(f"evaluation-{name}", lambda: evaluate(policy, self.model))

    def comparison(self, by: dict[str, dict[str, Path]], policies: dict[str, Path]) -> dict:
        """Selections beside the full oracle's, policies beside it and beside random."""
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        return {
            "selection": {
                where: compare_selections(
                    {name: stores[where] for name, stores in by.items()}, "full", tokenizer
                )
                for where in ("b", "heldout")
            },
            "policy": compare_policies(
                {name: self.evaluation(name, path) for name, path in policies.items()},
                ("full", "random"),
            ),
        }

    def report(self, name: str, result: dict) -> None:
        out = self.place / f"{name}.json"
        out.write_text(json.dumps(result, indent=1) + "\n")
        print(out.read_text())

    def nll(self, name: str, model: Path, pairs: Path) -> float:
        """Nats per response token of both responses of `pairs`."""
        measure = lambda: {"nats_per_token": response_nll(model, ScoredStore.open(pairs))}
        return self.measure(f"nll-{name}", measure)["nats_per_token"]


def parser(about: str) -> argparse.ArgumentParser:
    """What both scripts ask for."""
    found = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = found.add_argument
    add("--model", type=Path, default=Path("runs/smollm2"), help="the policy, made if missing")
    add("--place", type=Path, default=Path("runs/weak-to-strong"))
    return found


def sepo(command: str) -> None:
    print(f"sepo {' '.join(command.split())}", flush=True)
    subprocess.run([sys.executable, "-m", "sepo.commands.main", *shlex.split(command)], check=True)


# Measurements


def evaluate(policy: Path, reference: Path, *, per_opening: int = 4) -> dict:
    """Reward of each held-out opening, and KL(policy || reference) per token of what it wrote."""
    load = lambda path, dtype: AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    openings = (DATA / "heldout_openings.txt").read_text().splitlines()
    completions = sample(
        load(policy, fast_dtype("cpu")),  # every policy alike: a decoding step waits for weights
        AutoTokenizer.from_pretrained(reference),
        openings,
        per_opening=per_opening,
        max_new_tokens=40,
        seed=SEED,
        batch_size=128,
    )
    rewards = [sentiment(c.text) for c in completions]
    by_opening = np.reshape(rewards, (len(openings), per_opening)).mean(1)
    kl = {}
    if policy != reference:
        both = load(policy, torch.float32), load(reference, torch.float32)
        kl = {"kl_per_token": interval(kl_per_token(*both, completions, per_opening=1))}
    return {"reward_by_opening": by_opening.round(6).tolist(), **kl}


def response_nll(model: Path, pairs: Sequence) -> float:
    sequences = [(p.prompt.tolist(), r.tolist()) for p in pairs for r in (p.chosen, p.rejected)]
    logp = response_logp(AutoModelForCausalLM.from_pretrained(model, dtype="float32"), sequences)
    return round(-torch.cat(logp).mean().item(), 3)


def compare_policies(by_name: dict[str, dict], baselines: Sequence[str]) -> dict:
    """Mean reward of each, and its differences from the baselines', opening by opening."""
    rewards = {name: np.array(e["reward_by_opening"]) for name, e in by_name.items()}
    return {
        name: {
            "reward": over_openings(rewards[name]),
            "kl_per_token": evaluation.get("kl_per_token"),
        }
        | {
            f"reward_minus_{base}": over_openings(rewards[name] - rewards[base])
            for base in baselines
            if base != name
        }
        for name, evaluation in by_name.items()
    }


def compare_selections(stores: dict[str, Path], baseline: str, tokenizer) -> dict:
    """Lift on words of the judge's lexicon and overlap with the baseline's selection, 95 %."""
    pairs = {name: list(ScoredStore.open(path, tokenizer)) for name, path in stores.items()}
    known = [
        [in_lexicon(response, tokenizer) for response in (p.chosen, p.rejected)]
        for p in pairs[baseline]
    ]
    chosen = {name: [positions(p, "selected") for p in ps] for name, ps in pairs.items()}
    chosen["random"] = [positions(p, "random") for p in pairs[baseline]]
    return {
        name: {
            "lift": lift(known, selected),
            f"jaccard_with_{baseline}": jaccard(selected, chosen[baseline]),
        }
        for name, selected in chosen.items()
    }


def positions(pair, how: str) -> list[np.ndarray]:
    _, *sides = make_segments(pair, Selection(how, fraction=FRACTION, seed=SEED))
    return [side.positions for side in sides]


def lift(known: list, selected: list) -> list[float]:
    """Lexicon rate of the selected tokens over that of all; a bootstrap over pairs for the 95 %."""
    counts = np.array(
        [
            [
                sum(flags[where].sum() for flags, where in zip(k, s, strict=True)),
                sum(len(where) for where in s),
                sum(flags.sum() for flags in k),
                sum(len(flags) for flags in k),
            ]
            for k, s in zip(known, selected, strict=True)
        ]
    )
    ratio = lambda n: (n[..., 0] / n[..., 1]) / (n[..., 2] / n[..., 3])
    drawn = np.random.default_rng(SEED).integers(len(counts), size=(4000, len(counts)))
    low, high = np.quantile(ratio(counts[drawn].sum(1)), [0.025, 0.975])
    return [round(float(x), 3) for x in (ratio(counts.sum(0)), low, high)]


def jaccard(one: list, other: list) -> list[float]:
    """Intersection over union of the selected positions, a mean over responses, pairs as units."""
    values = [
        len(np.intersect1d(a, b)) / len(np.union1d(a, b))
        for sides in zip(one, other, strict=True)
        for a, b in zip(*sides, strict=True)
    ]
    if min(values) == 1:
        return [1.0, 1.0, 1.0]
    return interval(clustered_mean(values, [i // 2 for i in range(len(values))]))


def over_openings(values: np.ndarray) -> list[float]:
    return interval(clustered_mean(values.tolist(), range(len(values))))


def interval(estimate) -> list[float]:
    return [round(x, 4) for x in (estimate.mean, estimate.low, estimate.high)]
