"""SePO's selection as labels and masks, for any trainer that takes input_ids and labels.

Each sequence is cut after its last selected token: nothing later can change what is trained.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from sepo.data import ScoredPair
from sepo.data.segments import make_segments
from sepo.data.selection import Selection

UNUSED = -100
SIDES = ("chosen", "rejected")


class LabelledSequence(TypedDict):
    """One sequence as a trainer reads it: a list of token ids, and labels where they are used."""

    input_ids: list[int]
    labels: list[int]


def labelled_pairs(
    store: Iterable[ScoredPair], fraction: float = 0.3
) -> Iterator[dict[str, LabelledSequence]]:
    """Yield {"chosen": {"input_ids", "labels"}, "rejected": {...}} of every pair, in order.

    Labels stand where their tokens are, as transformers' losses expect them, and are -100 where a
    token is not selected: the highest scores of a chosen response, the lowest of a rejected one. A
    row with masks or weights of its own gives the tokens above zero; labels can't say how much a
    token counts. For SFT use the chosen half.

    Args:
        store: a `ScoredStore`, or any pairs with scores or weights.
        fraction: how many of a response's tokens are selected, in (0, 1].

    Raises:
        InputError: naming the row, for one that has neither scores nor weights.
    """
    for pair in store:
        yield {
            side: _labelled(pair.prompt, getattr(pair, side), positions)
            for side, positions in _selected(pair, fraction).items()
        }


def collate_pairs(
    pairs: Sequence[dict[str, LabelledSequence]], pad_token_id: int = 0
) -> dict[str, Tensor]:
    """Make a batch of (2 P, T) tensors whose sequences alternate: chosen, rejected.

    Args:
        pairs: what `labelled_pairs` yields, P of them.
        pad_token_id: any token will do: padding is marked by the attention mask.

    Returns:
        dict: input_ids, attention_mask and labels, each (2 P, T) int64.
    """
    sequences = [pair[side] for pair in pairs for side in SIDES]
    lengths = torch.tensor([len(s["input_ids"]) for s in sequences])
    input_ids = _padded([s["input_ids"] for s in sequences], pad_token_id)
    return {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
        "labels": _padded([s["labels"] for s in sequences], UNUSED),
    }


def masked_pairs(
    store: Iterable[ScoredPair], fraction: float = 0.3
) -> Iterator[dict[str, list[int]]]:
    """Yield rows of token ids for TRL's preference trainers, and which tokens are selected.

    Columns: prompt_ids, chosen_ids, rejected_ids, chosen_mask, rejected_mask; the masks are 0 or 1.
    `MaskedPreferenceCollator` reads them.

    Args:
        store: as for `labelled_pairs`.
        fraction: as for `labelled_pairs`.

    Raises:
        InputError: as `labelled_pairs`.
    """
    for pair in store:
        row = {"prompt_ids": pair.prompt.tolist()}
        for side, positions in _selected(pair, fraction).items():
            length = positions[-1] + 1
            row[f"{side}_ids"] = getattr(pair, side)[:length].tolist()
            row[f"{side}_mask"] = np.isin(np.arange(length), positions).astype(int).tolist()
        yield row


def _selected(pair: ScoredPair, fraction: float) -> dict[str, np.ndarray]:  # positions, (K,) int32
    _, *segments = make_segments(pair, Selection("selected", fraction=fraction))
    return {side: s.positions for side, s in zip(SIDES, segments, strict=True)}


def _labelled(
    prompt: np.ndarray,  # (T0,)
    response: np.ndarray,  # (T,)
    positions: np.ndarray,  # (K,) of the response, ascending
) -> LabelledSequence:
    input_ids = np.concatenate([prompt, response[: positions[-1] + 1]])
    labels = np.full(len(input_ids), UNUSED)
    labels[len(prompt) + positions] = response[positions]
    return {"input_ids": input_ids.tolist(), "labels": labels.tolist()}


def _padded(rows: Sequence[list[int]], value: int) -> Tensor:  # (2 P, T) int64
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
