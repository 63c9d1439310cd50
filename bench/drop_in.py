"""TRL's trainers on TRL's own head and on this one: losses, metrics, seconds and memory of both.

    python -m bench.drop_in                          # SmolLM2-135M: 20 steps of DPO, one of GRPO
    python -m bench.drop_in --pairs 4 --max_length 512
    python -m bench.drop_in --bf16                   # TRL's default; on a GPU that has it

Both runs begin at the same weights and see the same rows. GRPO rewards entropy, so its gradient is
taken. In float32 the runs stay together to rounding, which grows from update to update. Seconds and
memory are of the trainer's loss and its gradients on one batch, after the run: no generation, no
update. Memory is the allocator's peak above what is alive before.
"""

import argparse
import os
import statistics
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import torch
from transformers import PrinterCallback, Trainer

import sepo.patch
from bench.contender import missing
from bench.measure import Turns, peak_bytes
from bench.steps import models
from bench.steps.case import be_quiet
from bench.steps.pairs import ROOT, default_source, texts
from sepo.demo.smollm2 import save_smollm2
from sepo.errors import exit_with_one_line

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
HEADS = {"TRL's head": nullcontext, "sepo's": sepo.patch.trl}
# what a machine does, and not what the trainer computes
NOT_COMPARED = ("time", "second", "epoch", "num_tokens", "learning_rate", "flos")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=models.SMOLLM2, help="a folder, a hub id, or smollm2")
    parser.add_argument("--steps", type=int, default=20, help="of DPO; 0: none")
    parser.add_argument("--grpo_steps", type=int, default=1, help="0: none")
    parser.add_argument("--pairs", type=int, default=2, help="of one step; rollouts of one prompt")
    parser.add_argument("--max_length", type=int, default=256, help="of a DPO sequence, tokens")
    parser.add_argument("--completion", type=int, default=64, help="of a GRPO rollout, tokens")
    parser.add_argument("--rounds", type=int, default=5, help="in which the two heads take turns")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args(argv)
    if absent := missing("trl"):
        parser.error(absent)
    be_quiet()
    if args.model == models.SMOLLM2:
        args.model = str(save_smollm2(ROOT / "runs" / models.SMOLLM2))
    for kind, steps in (("DPO", args.steps), ("GRPO", args.grpo_steps)):
        if steps:
            print(
                f"\n{kind}, {steps} steps of {args.model}\n\n{beside(kind, steps, args)}",
                flush=True,
            )


def beside(kind: str, steps: int, args: argparse.Namespace) -> str:
    """Train on each head, then let the two take turns at one batch; a table in Markdown."""
    device, trainers = "cuda" if torch.cuda.is_available() else "cpu", {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's, of names that go
        for name, patch in HEADS.items():
            with patch():
                trainers[name] = make(kind, steps, device, args)
                trainers[name].train()
        calls = {name: one_batch(trainer, HEADS[name]) for name, trainer in trainers.items()}
        peaks = [peak_bytes(call, device) for call in calls.values()]
        turns = Turns(calls, device)
        for _ in range(args.rounds):
            turns.turn()
    logs = [[x for x in t.state.log_history if "loss" in x] for t in trainers.values()]
    times = [statistics.median(seconds) for seconds in turns.seconds.values()]
    rows = [("", *HEADS, "largest difference"), *[("---",) * 4], *metrics(*logs)]
    rows += [("seconds, median", *(f"{x:.2f}" for x in times), "")]
    rows += [("MiB at the peak", *(str(x >> 20) for x in peaks), "")]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def make(kind: str, steps: int, device: str, args: argparse.Namespace) -> Trainer:
    """TRL's trainer, its defaults where nothing is said."""
    import trl
    from datasets import Dataset

    common = dict(
        max_steps=steps, logging_steps=1, per_device_train_batch_size=args.pairs, bf16=args.bf16,
        report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=device == "cpu",
    )  # fmt: skip
    rows = texts(default_source())
    if kind == "DPO":
        config = trl.DPOConfig(models.TRAINERS, max_length=args.max_length, **common)
        trainer = trl.DPOTrainer(args.model, args=config, train_dataset=Dataset.from_list(rows))
    else:
        rollouts = dict(num_generations=args.pairs, max_completion_length=args.completion)
        config = trl.GRPOConfig(models.TRAINERS, entropy_coef=0.01, **rollouts, **common)
        prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in rows])
        how = dict(reward_funcs=different_words, args=config, train_dataset=prompts)
        trainer = trl.GRPOTrainer(args.model, **how)
    trainer.remove_callback(PrinterCallback)
    return trainer


def different_words(completions: list[str] | list[list[dict]], **columns) -> list[float]:
    """A reward that any model can earn."""
    words = [(c if isinstance(c, str) else c[-1]["content"]).split() for c in completions]
    return [len(set(found)) / max(1, len(found)) for found in words]


def one_batch(trainer: Trainer, patch: Callable) -> Callable[[], None]:
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))

    def call() -> None:
        with patch():
            trainer.compute_loss(trainer.model, dict(batch)).backward()
        trainer.model.zero_grad()

    return call


def metrics(theirs: list[dict], ours: list[dict]) -> list[tuple[str, ...]]:
    """A row for each: its last values, and the largest difference over all steps."""
    rows = []
    for name, last in theirs[-1].items():
        if not any(word in name for word in NOT_COMPARED):
            apart = max(abs(a[name] - b[name]) for a, b in zip(theirs, ours, strict=True))
            rows.append((name, f"{last:.6g}", f"{ours[-1][name]:.6g}", f"{apart:.1e}"))
    return rows


if __name__ == "__main__":
    exit_with_one_line(main)
