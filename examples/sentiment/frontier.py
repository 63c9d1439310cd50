"""Reward against divergence: SparsePO's section 3.2 and two of SePO's figures, small but whole.

Every method is trained at several strengths on the same pairs, and each policy continues held-out
openings: how positive its words are, and how far it went from the reference for that.

    python examples/sentiment/frontier.py run      # all runs; again after a kill: what is missing
    python examples/sentiment/frontier.py report   # table and figures of the runs that are whole

Start `run` as often as there are cores (OMP_NUM_THREADS=1 each): no run is made twice. A run is one
folder of --output_dir: metrics.jsonl of the training, completions.jsonl, and result.json, written
last.
"""

import argparse
import fcntl
import json
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean

import torch
import transformers
from frontier_grid import ORACLE, QUICK, Run, Scale, granularities, grid
from frontier_masks import mask_words
from frontier_report import write_granularity, write_report
from transformers import AutoModelForCausalLM, PreTrainedModel

import sepo
from sepo.data.read.read import read_pairs
from sepo.data.store.store import ScoredStore
from sepo.data.types import ScoredPair, TokenPair
from sepo.demo import DATA
from sepo.demo.evaluate import Estimate, clustered_mean, first_of_each, token_kl
from sepo.demo.judge import sentiment
from sepo.demo.run import continue_openings, read_lines, score, train
from sepo.demo.sample import Completion
from sepo.demo.smollm2 import save_smollm2
from sepo.errors import InputError, exit_with_one_line
from sepo.masks import MASK_FILE
from sepo.model.load import load_model, load_tokenizer
from sepo.system.files import Atomic
from sepo.trainer.methods import METHODS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RESULT = "result.json"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    runs = grid()
    if args.granularity:
        wanted = {run.name for of_seeds in granularities().values() for run in of_seeds}
        runs = [run for run in runs if run.name in wanted]
    runs = [r for r in runs if not args.only or any(part in r.name for part in args.only)]
    scale = QUICK if args.quick else Scale()
    if args.command == "report":
        results, to = read_results(args.output_dir, runs, scale), args.to or args.output_dir
        if not args.granularity:
            write_report(args.output_dir, results, runs, to)
        write_granularity(results, to, scale)
        return
    shared = Shared(args.output_dir, args.data, args.model, scale)
    index, count = args.shard
    for run in runs[index::count]:
        with lock(args.output_dir, run.name) as free:
            if not free:
                print(f"{run.name}: another process is at it", flush=True)
            elif read_result(args.output_dir, run, scale) is None:
                make(run, shared)
    missing = [r.name for r in runs if read_result(args.output_dir, r, scale) is None]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are whole in {args.output_dir}")


class Shared:
    """What several runs use: made by the first that needs it, kept in the output directory."""

    def __init__(self, place: Path, data: Path, model: Path | None, scale: Scale):
        self.place, self.scale = place, scale
        self.openings = read_lines(data / "heldout_openings.txt")[: scale.openings]
        place.mkdir(parents=True, exist_ok=True)
        with lock(place, "model", wait=True):
            self.model_dir = model or save_smollm2(place / "model")
        self.tokenizer = load_tokenizer(str(self.model_dir))
        read = lambda name: read_pairs(data / name, self.tokenizer, append_eos=False).pairs
        pairs, self.heldout = read("pairs.jsonl"), read("heldout.jsonl")[: scale.heldout]
        random.Random(scale.shuffle_seed).shuffle(pairs)  # the file goes through the openings
        self.pairs: list[TokenPair] = pairs[: scale.pairs]

    @cached_property
    def reference(self) -> PreTrainedModel:
        """As the judge of divergence: the plain model."""
        return load_plain(self.model_dir)

    @cached_property
    def live_reference(self) -> PreTrainedModel:
        """As a training run wants it: prepared for packed batches."""
        return load_model(str(self.model_dir), device=DEVICE).requires_grad_(False)

    @cached_property
    def cached(self) -> ScoredStore:
        """The reference's log-probabilities and states on the training pairs."""
        return self._stored("reference", self.model_dir, ("logp", "hidden"))

    def scored(self, share: int) -> list[ScoredPair]:
        """The training pairs with the scores of an oracle that saw `share` per cent of them."""
        oracle = self.place / f"oracle{share}"
        with lock(self.place, oracle.name, wait=True):
            if not (oracle / RESULT).exists():
                shutil.rmtree(oracle, ignore_errors=True)
                seen = [self.cached[i] for i in range(max(1, len(self.pairs) * share // 100))]
                how = dict(ORACLE, seed=0, device=DEVICE)
                train(self.model_dir, seen, oracle, self.tokenizer, **how)
                write_json(oracle / RESULT, {"settings": ORACLE, "pairs": len(seen)})
        # half the work of scoring with both models: what the reference says is known
        stored = self._stored(f"{oracle.name}_logp", oracle, ("logp",))
        both = zip(stored.pairs(), self.cached.pairs(), strict=True)
        return [with_scores(own, reference) for own, reference in both]

    def _stored(self, name: str, model: Path, keep: tuple[str, ...]) -> ScoredStore:
        with lock(self.place, name, wait=True):
            place = self.place / name
            return score(self.pairs, place, self.tokenizer, model, keep=keep, device=DEVICE)


def with_scores(oracle: ScoredPair, reference: ScoredPair) -> ScoredPair:
    """A score is the oracle's log-probability minus the reference's (SePO, eq. 9)."""
    sides = ("chosen", "rejected")
    logp = lambda of, side: getattr(of, f"{side}_ref_logp")
    return replace(
        reference,
        **{f"{side}_score": logp(oracle, side) - logp(reference, side) for side in sides},
    )


def make(run: Run, shared: Shared) -> None:
    """Train and evaluate one policy. What a killed process left of it is made anew."""
    place, started = shared.place / run.name, time.perf_counter()
    print(f"\n== {run.name}", flush=True)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    policy = train_policy(run, shared, place) if run.arguments else shared.reference
    trained = time.perf_counter()
    result = evaluate(policy, shared, place)
    if (place / MASK_FILE).exists():
        result["mask"] = mask_words(place, shared.live_reference, shared.heldout, shared.tokenizer)
    (place / "model.safetensors").unlink(missing_ok=True)  # half a gigabyte a run
    result |= {
        "settings": run.settings(shared.scale),
        "seconds": {"train": trained - started, "evaluate": time.perf_counter() - trained},
        "made_with": {m.__name__: m.__version__ for m in (sepo, torch, transformers)}
        | {"device": DEVICE, "threads": torch.get_num_threads()},
    }
    write_json(place / RESULT, result)
    reward, kl = (Estimate(**result[key]) for key in ("reward", "kl"))
    print(f"{run.name}: sentiment {reward}, KL {kl} nats a response", flush=True)


def train_policy(run: Run, shared: Shared, place: Path) -> PreTrainedModel:
    pairs, how = shared.pairs, {}
    reads = METHODS[run.arguments["method"]].reference
    if run.oracle_share is not None:
        pairs = shared.scored(run.oracle_share)
    elif reads == "layers" or run.arguments["method"] in ("dpop", "selective-dpo"):
        # no store keeps layers; and DPOP's penalty makes 50 times as much of what lies between
        # the cache's float32 and the training's bfloat16, by which Selective-DPO would choose first
        how["reference_model"] = shared.live_reference
    elif reads is not None:
        pairs = shared.cached
    train(shared.model_dir, pairs, place, shared.tokenizer, device=DEVICE, **how, **run.arguments)
    return load_plain(place)


def evaluate(policy: PreTrainedModel, shared: Shared, place: Path) -> dict:
    """Means with 95 % intervals over openings, and each opening's own."""
    scale = shared.scale
    completions = continue_openings(
        policy,
        shared.tokenizer,
        shared.openings,
        per_opening=scale.per_opening,
        seed=scale.sample_seed,
        name=place.name,
    )
    with Atomic(place / "completions.jsonl", "0") as temporary:
        lines = (json.dumps(asdict(c), ensure_ascii=False) + "\n" for c in completions)
        temporary.write_text("".join(lines), encoding="utf-8")
    rewards = [sentiment(c.text) for c in completions]
    read = first_of_each(completions, scale.kl_per_opening)
    kl = [values.tolist() for values in token_kl(policy, shared.reference, read)]
    return {
        "reward": over_openings(rewards, completions),
        "kl": over_openings([sum(values) for values in kl], read),
        "kl_per_token": over_openings([fmean(values) for values in kl], read),
        "tokens": fmean(len(c.ids) for c in completions),
        "rewards": [round(r, 4) for r in rewards],
        "kls": [round(sum(values), 5) for values in kl],
    }


def over_openings(values: list[float], of: list[Completion]) -> dict[str, float]:
    return asdict(clustered_mean(values, [c.opening for c in of]))


def load_plain(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval().to(DEVICE)


def read_results(place: Path, runs: list[Run], scale: Scale) -> dict[str, dict]:
    """The result of every run that is whole, by its name."""
    found = {run.name: read_result(place, run, scale) for run in runs}
    return {name: result for name, result in found.items() if result is not None}


def read_result(place: Path, run: Run, scale: Scale) -> dict | None:
    """None for a run that is not whole. Raises InputError for one that was made otherwise."""
    file = place / run.name / RESULT
    if not file.exists():
        return None
    result = json.loads(file.read_text())
    wanted = json.loads(json.dumps(run.settings(scale)))
    for key in wanted.keys() | result["settings"].keys():
        if (found := result["settings"].get(key)) != (expected := wanted.get(key)):
            raise InputError(
                f"{file}: expected {key} {expected}, got {found}; "
                "delete the folder, or choose another --output_dir"
            )
    return result


@contextmanager
def lock(place: Path, name: str, *, wait: bool = False) -> Iterator[bool]:
    """Hold `name` among one machine's processes; False if another has it. A kill lets it go."""
    folder = place / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def write_json(file: Path, value: dict) -> None:
    with Atomic(file, "0") as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("command", choices=("run", "report"))
    add("--output_dir", type=Path, default=Path("runs/frontier"))
    add("--data", type=Path, default=DATA, help="directory of the data files")
    add("--model", type=Path, help="checkpoint of the reference; default: SmolLM2, converted")
    add("--only", nargs="+", metavar="PART", help="runs whose name holds one of these")
    add("--granularity", action="store_true", help="the runs of the study of granularity only")
    add("--shard", type=shard, default=(0, 1), metavar="i/n", help="every n-th run only")
    add("--quick", action="store_true", help="a few pairs and openings: does it run at all?")
    add("--to", type=Path, help="report: where to; default: --output_dir")
    return parser.parse_args(argv)


def shard(text: str) -> tuple[int, int]:
    try:
        index, count = map(int, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected i/n, as in 0/2, got {text}") from None
    if not 0 <= index < count:
        raise argparse.ArgumentTypeError(f"expected i/n with 0 <= i < n, got {text}")
    return index, count


if __name__ == "__main__":
    exit_with_one_line(main)
