"""Could a learned mask know the words? What the reference's states tell of the token before them.

    python examples/sentiment/frontier_probe.py --output_dir runs/frontier --model runs/smollm2

A mask is read at the row that predicts a token, so it has not seen it. For the masks of the runs
that are whole: the mean at rows that predict a word of the judge's lexicon over the mean at other
rows, and the same of rows that have just read one. Below them what a mask could learn at best: a
logistic regression on one layer, trained with the lexicon as its labels. Held-out pairs.
"""

import argparse
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from frontier_masks import states_of, summary, words
from torch import Tensor

from sepo.data.read.read import read_pairs
from sepo.data.types import TokenPair
from sepo.demo import DATA
from sepo.errors import exit_with_one_line
from sepo.masks import load_mask
from sepo.model.load import load_model, load_tokenizer

TRAINED_ON = 96  # pairs, of those that the policies are trained on
DECAY = 1e-3


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("runs/frontier"))
    add("--model", required=True, help="checkpoint of the reference")
    add("--data", type=Path, default=DATA, help="directory of the data files")
    args = parser.parse_args(argv)
    tokenizer = load_tokenizer(args.model)
    reference = load_model(args.model).requires_grad_(False)
    training, heldout = (
        read_pairs(args.data / f"{name}.jsonl", tokenizer, append_eos=False).pairs
        for name in ("pairs", "heldout")
    )
    random.Random(0).shuffle(training)
    # all layers of all rows are kept, so in half the bytes
    held = [states_of(reference, pair).half() for pair in heldout]
    labels = labels_of(heldout, tokenizer)
    print("| held-out pairs | next token | token just read |\n|---|---|---|")
    for folder in sorted(file.parent for file in args.output_dir.glob("*/sparse_mask.safetensors")):
        mask = load_mask(folder)
        with torch.no_grad():
            both = [mask(states.float()) for states in held]
        names = ("reward", "kl") if mask.kl is not None else ("reward",)
        for number, name in enumerate(names):
            values = [of_pair[number].numpy() for of_pair in both]
            row(f"{folder.name}, {name}", [values] * 2, labels)
    seen = [states_of(reference, pair).half() for pair in training[:TRAINED_ON]]
    truth = labels_of(training[:TRAINED_ON], tokenizer)
    count = len(seen[0])
    for layer in (count // 3 - 1, 2 * count // 3 - 1, count - 1):
        fit = [
            regression(torch.cat([s[layer] for s in seen]).float(), np.concatenate(of))
            for of in truth
        ]
        values = [[predict(f, states[layer].float()) for states in held] for f in fit]
        row(f"regression on layer {layer + 1} of {count}", values, labels)


def labels_of(pairs: list[TokenPair], tokenizer) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Of each pair, (T,) bool: whether the token is of the lexicon, and whether the one before is."""
    known = [words(pair, tokenizer) for pair in pairs]
    before = lambda side: np.r_[False, side[:-1]]
    return (
        [np.concatenate(sides) for sides in known],
        [np.concatenate([before(side) for side in sides]) for sides in known],
    )


def row(name: str, values: list[list[np.ndarray]], labels: tuple) -> None:
    cells = ""
    for found, of in zip(values, labels, strict=True):
        said = summary(found, of)
        if None in (said["ratio"], *said["ratio_ci95"]):
            cells += " – |"
            continue
        low, high = said["ratio_ci95"]
        rank = auc(np.concatenate(found), np.concatenate(of))
        cells += f" {said['ratio']:.2f} [{low:.2f}, {high:.2f}], AUC {rank:.2f} |"
    print(f"| {name} |{cells}", flush=True)


def regression(states: Tensor, labels: np.ndarray) -> Tensor:  # (T, D), (T,) -> (D + 1,)
    found = torch.zeros(states.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([found], max_iter=100)
    target = torch.from_numpy(labels).float()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(logits(found, states), target)
        loss = loss + DECAY * found[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return found.detach()


def predict(fit: Tensor, states: Tensor) -> np.ndarray:  # a probability a row
    return logits(fit, states).sigmoid().numpy()


def logits(fit: Tensor, states: Tensor) -> Tensor:
    return F.layer_norm(states, states.shape[-1:]) @ fit[:-1] + fit[-1]


def auc(values: np.ndarray, labels: np.ndarray) -> float:
    """How often a row of the lexicon is above another one; ties count half."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # from 1, the mean of equals
    ones = labels.sum()
    return float((ranks[labels].sum() - ones * (ones + 1) / 2) / (ones * (len(labels) - ones)))


if __name__ == "__main__":
    exit_with_one_line(main)
