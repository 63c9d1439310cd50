"""Preference pairs go in, an aligned model comes out, every stage of SePO is real.

SmolLM2-135M-Instruct continues openings of movie reviews; a sentiment lexicon is the judge. An
oracle is trained by DPO on part of the pairs, scores every token, and a fresh policy is trained on
the 30 % of the tokens that the oracle finds decisive. The oracle is never shown the lexicon.
"""

import copy
import json
import random
import shutil
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from sepo.data.counts import count_rows, count_tokens
from sepo.data.read.read import read_pairs
from sepo.data.segments import make_segments
from sepo.data.selection import Selection
from sepo.data.store.store import ScoredStore
from sepo.data.types import ScoredPair, TokenPair
from sepo.demo.estimate import estimate
from sepo.demo.evaluate import chosen_wins, kl_per_token, mean_sentiment, pair_accuracy
from sepo.demo.lexicon import selection_lift
from sepo.demo.report import print_report
from sepo.demo.sample import Completion, sample
from sepo.demo.smollm2 import save_smollm2
from sepo.errors import InputError
from sepo.model.load import load_model, load_tokenizer
from sepo.score.score import score_dataset
from sepo.system.lock import contents, lock
from sepo.trainer.config import SePOConfig
from sepo.trainer.trainer import SePOTrainer
from sepo_kernels.devices import fast_dtype

FOLDERS = ("reference", "oracle", "scored", "sepo", "sepo_rand")
SUMMARY = "summary.json"
MARKER = ".sepo-demo"  # the directory is the demo's own: a second run may start it afresh


# the trials behind these numbers are in LOG.md
ORACLE: dict[str, Any] = dict(
    method="dpo", beta=0.1, learning_rate=5e-6, num_train_epochs=1, pairs_per_step=4
)
POLICY: dict[str, Any] = dict(
    method="sepo",
    gamma=2.0,
    margin=0.5,
    fraction=0.3,
    learning_rate=1e-5,
    num_train_epochs=1,
    pairs_per_step=12,
)


def run_demo(
    place: Path,
    data: Path,  # a folder with pairs.jsonl, heldout.jsonl and heldout_openings.txt
    *,
    oracle_pairs: int,  # that the oracle is trained on
    per_opening: int,  # fresh samples of each held-out opening
    seed: int,
) -> None:
    """Run every stage, print a table and write summary.json. Raises InputError for missing data."""
    with lock(place, "demo"):
        run_stages(place, data, oracle_pairs=oracle_pairs, per_opening=per_opening, seed=seed)


def run_stages(place: Path, data: Path, *, oracle_pairs: int, per_opening: int, seed: int) -> None:
    stage = Stages()
    openings = read_lines(data / "heldout_openings.txt")
    counts = {name: len(read_lines(data / f"{name}.jsonl")) for name in ("pairs", "heldout")}
    start_afresh(place)
    sizes = dict(oracle_pairs=oracle_pairs, samples=len(openings) * per_opening)
    print(how_long(**sizes, openings=len(openings), **counts), flush=True)
    with stage("model"):
        model_dir = save_smollm2(place / "model")
        tokenizer = load_tokenizer(str(model_dir))
    with stage("read"):
        read = lambda name: read_pairs(data / name, tokenizer, append_eos=False).pairs
        pairs, heldout = read("pairs.jsonl"), read("heldout.jsonl")
        random.Random(seed).shuffle(pairs)  # the file goes through the openings in order
    with stage("reference"):  # DPO and the scores need its log-probabilities, once
        cached = score(pairs + heldout, place / "reference", tokenizer, model_dir, keep=["logp"])
    with stage("oracle"):
        seen = [cached[i] for i in range(min(oracle_pairs, len(pairs)))]
        train(model_dir, seen, place / "oracle", tokenizer, seed=seed, **ORACLE)
    with stage("score"):
        store = score(cached, place / "scored", tokenizer, None, place / "oracle")
    scored = [store[i] for i in range(len(pairs))]
    with stage("sepo"):
        train(model_dir, scored, place / "sepo", tokenizer, seed=seed, **POLICY)
    with stage("sepo_rand"):
        drawn = dict(POLICY, method="sepo-rand")
        train(model_dir, scored, place / "sepo_rand", tokenizer, seed=seed, **drawn)
    with stage("evaluate"):
        unseen = [cached[i] for i in range(len(pairs), len(cached))]
        policy = evaluate(
            place, model_dir, tokenizer, openings, unseen, per_opening=per_opening, seed=seed
        )

    cut = lambda how, among: [
        make_segments(p, Selection(how, fraction=POLICY["fraction"], seed=seed)) for p in among
    ]
    lift = lambda among: selection_lift(
        among, cut("selected", among), cut("random", among), tokenizer
    )
    summary = {
        "stages": stage.seconds,
        "pairs": {"train": len(pairs), "heldout": len(heldout)},
        "selection": lift([store[i] for i in range(len(pairs), len(store))]),
        "selection_train": lift(scored),
        "tokens": count_tokens(scored, cut("selected", scored)),
        "rows": count_rows(scored, cut("selected", scored)),
        "policy": policy,
    }
    (place / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    print_report(summary)
    print(f"\n{place / SUMMARY}; the aligned model: {place / 'sepo'}")


def how_long(*, oracle_pairs: int, samples: int, pairs: int, heldout: int, openings: int) -> str:
    counts = {
        "run": 1,
        "pairs": pairs,
        "oracle pairs": min(oracle_pairs, pairs),
        "held-out pairs": heldout,
        "all pairs": pairs + heldout,
        "openings": openings,
        "samples": samples,
    }
    return estimate(counts)


def score(
    pairs: Sequence[TokenPair],
    place: Path,
    tokenizer,
    reference: Path | None,  # None: `pairs` is a store that keeps what it said
    oracle: Path | None = None,
    *,
    keep: Sequence[str] = ("score",),
    device: str = "cpu",
) -> ScoredStore:
    """A complete store, float32."""
    load = lambda path: None if path is None else load_model(str(path), device=device)
    score_dataset(
        pairs,
        place,
        reference=load(reference),
        oracle=load(oracle),
        tokenizer=tokenizer,
        keep=keep,
        max_tokens=1024,  # small batches keep the progress bar moving
        shard=(0, 1),
    )
    return ScoredStore.open(place, tokenizer)


def train(
    model_dir: Path,
    pairs: Sequence[TokenPair],
    place: Path,
    tokenizer,
    *,
    device: str = "cpu",
    reference_model: PreTrainedModel | None = None,
    **arguments,
) -> None:
    """Train a fresh copy of the model and save it in float32."""
    defaults: dict[str, Any] = dict(
        lr_scheduler_type="constant_with_warmup",
        max_tokens_per_batch=2048,
        save_strategy="no",
        logging_steps=5,
        use_cpu=device == "cpu",
        bf16="auto",  # arithmetic only: weights, and so the saved oracle, stay float32
    )
    config = SePOConfig(output_dir=str(place), **defaults | arguments)
    trainer = SePOTrainer(
        load_model(str(model_dir), device=device),
        config,
        train_dataset=pairs,
        processing_class=tokenizer,
        reference_model=reference_model,
    )
    trainer.train()
    trainer.save_model()


def continue_openings(
    model: PreTrainedModel,  # float32
    tokenizer,
    openings: list[str],
    *,
    per_opening: int,
    max_new_tokens: int = 40,
    seed: int,
    name: str,  # on the progress bar
) -> list[Completion]:
    """Samples of a policy. A seed means the same random numbers, whichever model is asked."""
    # a decoding step waits for weights: bfloat16 halves them, for every model alike; but where it
    # is slow at that, a machine would wait for the products
    dtype = fast_dtype(model.device)
    if model.dtype != dtype:
        model = copy.deepcopy(model)
        model.to(dtype)  # type: ignore[arg-type]  # transformers' wraps() loses `self`
    with tqdm(total=len(openings) * per_opening, desc=f"sample {name}") as bar:
        return sample(
            model,
            tokenizer,
            openings,
            per_opening=per_opening,
            max_new_tokens=max_new_tokens,
            seed=seed,
            batch_size=128,
            progress=lambda done, _: bar.update(done - bar.n),
        )


def evaluate(
    place: Path,
    model_dir: Path,
    tokenizer,
    openings: list[str],
    heldout: Sequence[ScoredPair],  # with the reference's log-probabilities
    *,
    per_opening: int,
    seed: int,
) -> dict:
    """Reward, held-out accuracy and distance from the reference, of all three policies."""
    load = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
    reference = load(model_dir)
    result = {}
    for name in ("reference", "sepo", "sepo_rand"):
        model = reference if name == "reference" else load(place / name)
        completions = continue_openings(
            model, tokenizer, openings, per_opening=per_opening, seed=seed, name=name
        )
        reward = mean_sentiment(completions)
        if name == "reference":
            logp = [(pair.chosen_ref_logp, pair.rejected_ref_logp) for pair in heldout]
            accuracy = chosen_wins(*zip(*logp, strict=True))
        else:
            accuracy = pair_accuracy(model, heldout, dtype=fast_dtype(model.device))
        result[name] = {
            "reward": reward.mean,
            "reward_ci95": [reward.low, reward.high],
            "accuracy": accuracy.mean,
        }
        if name != "reference":
            result[name]["kl_per_token"] = kl_per_token(
                model, reference, completions, per_opening=1
            ).mean
    return result


class Stages:
    """Names a stage on the screen and keeps its seconds."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str):
        print(f"\n== {name}", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)


def read_lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise InputError(
            f"--data: {path}: {error.strerror}; examples/sentiment makes it"
        ) from error


def start_afresh(place: Path) -> None:
    """Empty the demo's own directory, but for the converted model; leave any other alone."""
    marker = place / MARKER
    if contents(place) and not marker.exists():
        raise InputError(f"--output_dir {place}: not empty and not made by the demo")
    for name in FOLDERS:
        shutil.rmtree(place / name, ignore_errors=True)
    (place / SUMMARY).unlink(missing_ok=True)
    marker.touch()
