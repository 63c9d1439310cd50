"""A complete small run on disk: model, tokenizer, scored store, YAML."""

import json
from pathlib import Path

import yaml
from manifests import manifest
from tiny import random_scored_pairs, tiny_model, tiny_tokenizer

from sepo.data.store.store import StoreWriter, pairs_hash, template_hash, tokenizer_hash


def make_run(
    path: Path,
    *,
    pairs: int = 12,
    eval_pairs: int = 0,
    model: dict | None = None,  # arguments of tiny_model
    **arguments,  # of SePOConfig
) -> list[str]:
    """Write it all below `path`; return the arguments of `sepo train` but for --output_dir."""
    tiny_model(**(model or {})).save_pretrained(path / "model")
    tiny_tokenizer().save_pretrained(path / "model")
    write_store(path / "store", random_scored_pairs(pairs))
    if eval_pairs:
        write_store(path / "eval", random_scored_pairs(eval_pairs, seed=1))
        arguments["eval_dataset_name"] = str(path / "eval")
    config = dict(
        method="sepo",
        model_name_or_path=str(path / "model"),
        dataset_name=str(path / "store"),
        pairs_per_step=4,
        max_tokens_per_batch=40,
        learning_rate=0.01,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=1,
    )
    (path / "run.yaml").write_text(yaml.safe_dump({**config, **arguments}))
    return ["--config", str(path / "run.yaml")]


def write_store(path: Path, pairs: list, **entries) -> None:
    """A store of one part, as `sepo score --keep logp` would leave it."""
    tokenizer = tiny_tokenizer()
    defaults = manifest(
        tokenizer=tokenizer_hash(tokenizer),
        tokenizer_name="tiny",
        chat_template=template_hash(tokenizer),
        source=pairs_hash(pairs),
        keep=["logp", "score"],
        pairs=len(pairs),
        pairs_per_part=len(pairs),
    )
    writer = StoreWriter(path, {**defaults, **entries})
    writer.write(0, pairs)
    writer.finish()


def read_log(output_dir: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock, or on where a run was continued."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in _of_the_clock(line)} for line in lines]


def _of_the_clock(line: dict) -> set[str]:
    return line.keys() - {"step", "epoch"} if "train_runtime" in line else {"tokens/second"}
