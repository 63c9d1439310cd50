"""The CSV of SePO's released code: texts, and which tokens of them its oracle selected.

It was made with one tokenizer, and positions mean nothing under another. So it also lists token
ids, and they are compared before a position is believed.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from sepo.data.read import cells
from sepo.errors import InputError

KIND = {"chosen": "selected", "rejected": "unselected"}  # the highest scores, the lowest
COLUMNS = (
    "prompt",
    *(f"{side}_response" for side in KIND),
    *(f"{side}_{kind}_{what}" for side, kind in KIND.items() for what in ("args", "ids")),
)


@dataclass(frozen=True, slots=True)
class Selected:
    """Hold what a row says of one response. The code counts predictions: entry p selects token p + 1."""

    before: np.ndarray  # (K,) int32 index of the token before each selected one, best first
    ids: np.ndarray  # (K,) int32 ids of these tokens, not of the selected ones
    response: np.ndarray | None  # (T',) int32 all ids; the end token is put in where it was cut

    def weight(self, response: np.ndarray) -> np.ndarray | str:  # (T,) int32 -> (T,) float32
        """1 for the selected tokens and 0 elsewhere, or how these tokens differ from the row's."""
        where, expected = self.before, self.ids
        if self.response is not None:
            where = np.append(where, np.arange(len(self.response) - 1))
            expected = np.append(expected, self.response[:-1])
        short = where >= len(response) - 1  # nothing follows that could be selected
        wrong = np.flatnonzero(short | (response[np.where(short, 0, where)] != expected))
        if len(wrong):
            first = wrong[where[wrong].argmin()]
            got = "the end" if short[first] else response[where[first]]
            return f"token {where[first]}: expected {expected[first]}, got {got}"
        after = self.before + 1
        if self.response is not None:  # an end token that is not there was never predicted
            after = after[self.response[after] == response[after]]
        weight = np.zeros(len(response), np.float32)
        weight[after] = 1
        return weight


def read_selected(row: dict, pair_id: str, side: str) -> Selected:
    """The columns of one side. Raises InputError for cells that are no lists, or do not fit."""
    args, ids = (f"{side}_{KIND[side]}_{what}" for what in ("args", "ids"))
    whole = f"{side}_responses_ids"
    found = Selected(
        before=_list(row[args], pair_id, args),
        ids=_list(row[ids], pair_id, ids),
        response=_list(row[whole], pair_id, whole) if row.get(whole) else None,
    )
    if len(found.before) != len(found.ids):
        raise InputError(
            f"pair {pair_id}: expected {ids} to hold {len(found.before)} numbers, one for each of "
            f"{args}, got {len(found.ids)}"
        )
    if found.response is not None and (found.before >= len(found.response) - 1).any():
        raise InputError(
            f"pair {pair_id}: expected {args} below {len(found.response) - 1}, the last place before "
            f"the end of {whole}, got {found.before.max()}"
        )
    return found


def read_text(value: Any, pair_id: str, field: str) -> str:
    """A cell's text. The code writes its file with an escape character, and never undoes it."""
    text = cells.string(value, pair_id, field)
    halved = text.replace("\\\\", "\\")
    is_doubled = halved.count("\\") * 2 == text.count("\\")
    return halved if is_doubled else text


def _list(value: Any, pair_id: str, field: str) -> np.ndarray:  # (K,) int32
    """Numbers joined by commas, in brackets or without."""
    if isinstance(value, str):
        value = f"[{value.strip(' []')}]"
    return cells.token_ids(value, pair_id, field)
