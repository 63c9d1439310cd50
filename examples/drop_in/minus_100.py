"""SePO's selection as -100 labels, for any trainer that takes input_ids and labels.

    python examples/drop_in/minus_100.py runs/scored --fraction 0.3 --output selected.jsonl

A line a pair: {"chosen": {"input_ids", "labels"}, "rejected": {...}}. For SFT use the chosen half.
Each sequence is cut after its last selected token: nothing later can change what is trained.
"""

import argparse
import json
from collections.abc import Iterator

import numpy as np
import torch

from sepo.data import ScoredPair
from sepo.data.segments import make_segments
from sepo.data.selection import Selection
from sepo.data.store import ScoredStore
from sepo.errors import exit_with_one_line

UNUSED = -100


def labelled_pairs(store, fraction: float = 0.3) -> Iterator[dict]:
    """Both sequences of every pair of a scored store, in its order."""
    for pair in store:
        chosen, rejected = selected(pair, fraction)
        yield {
            "chosen": labelled(pair.prompt, pair.chosen, chosen),
            "rejected": labelled(pair.prompt, pair.rejected, rejected),
        }


def selected(pair: ScoredPair, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the decisive tokens of both responses: highest scores, lowest scores.

    A row with masks of its own gives those. Labels can't say how much a token counts: weights
    above zero are all one.
    """
    _, chosen, rejected = make_segments(pair, Selection("selected", fraction=fraction))
    return chosen.positions, rejected.positions


def labelled(
    prompt: np.ndarray,  # (T0,)
    response: np.ndarray,  # (T,)
    positions: np.ndarray,  # (K,) of the response, ascending
) -> dict[str, list[int]]:
    """input_ids, and labels that are -100 wherever the token is not selected."""
    # a trainer shifts the labels itself: each stands where its token is
    input_ids = np.concatenate([prompt, response[: positions[-1] + 1]])
    labels = np.full(len(input_ids), UNUSED)
    labels[len(prompt) + positions] = response[positions]
    return {"input_ids": input_ids.tolist(), "labels": labels.tolist()}


def collate_pairs(pairs: list[dict], pad_token_id: int = 0) -> dict[str, torch.Tensor]:
    """A batch of (2 P, T) tensors whose sequences alternate: chosen, rejected.

    Padding is marked by the attention mask, so any token will do.
    """
    sequences = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    padded = lambda name, value: torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(s[name]) for s in sequences], batch_first=True, padding_value=value
    )
    lengths = torch.tensor([len(s["input_ids"]) for s in sequences])
    input_ids = padded("input_ids", pad_token_id)
    return {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
        "labels": padded("labels", UNUSED),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", help="written by `sepo score`")
    parser.add_argument("--fraction", type=float, default=0.3)
    parser.add_argument("--output", required=True)
    args = parser.parse_args(argv)
    pairs = list(labelled_pairs(ScoredStore.open(args.store), args.fraction))
    with open(args.output, "w") as file:
        for pair in pairs:
            file.write(json.dumps(pair) + "\n")


if __name__ == "__main__":
    exit_with_one_line(main)
