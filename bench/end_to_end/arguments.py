"""What both programs ask for, and how they speak: `bench.end_to_end` and `bench.kl_steps`."""

import argparse
import logging
from pathlib import Path

import torch
import transformers
from datasets import disable_progress_bars

from bench import report
from bench.end_to_end import models
from bench.harness import device_here


def add_arguments(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    add = parser.add_argument
    add("--model", help=f"smollm2, {', '.join(models.SHAPES)}, a directory or a hub id")
    add("--data", type=Path, help="preference pairs; default dpo_en_demo.json, else examples/")
    add("--pairs", type=int, default=4, help="of one step")
    add("--rounds", type=int, default=rounds)
    add("--max_length", type=int, default=512)
    add("--device", default=device_here(), choices=("cpu", "cuda"))
    add("--float32", action="store_true", help="no autocast")
    add("--json", type=Path, help="append rows to this file; default bench/results")


def setting(args: argparse.Namespace, *versions: str) -> tuple[str, str, str]:
    """What is the same for all."""
    libraries = f"torch {torch.__version__}", f"transformers {transformers.__version__}", *versions
    return (
        f"weights float32, {'no' if args.float32 else 'bfloat16'} autocast, fused AdamW in float32",
        f"{report.machine(args.device)}, {torch.get_num_threads()} threads",
        ", ".join(libraries),
    )


def be_quiet() -> None:
    disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)


def say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)  # a run that is stopped has said where
