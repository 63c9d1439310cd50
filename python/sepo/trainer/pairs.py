"""Pairs as a method reads them, made when a step asks for them; their lengths at once, for the plan."""

from collections.abc import Mapping, Sequence

import numpy as np

from sepo.data.contents import PAIRS, REF_LOGP, SCORES, ContentHash
from sepo.data.cost import pair_costs
from sepo.data.segments import check_tokens, make_segments, num_selected
from sepo.data.selection import Selection
from sepo.data.types import CutPair, TokenPair
from sepo.errors import InputError
from sepo.flags.selection import selection_flags
from sepo.trainer.config import SePOConfig
from sepo.trainer.methods import METHODS


class PreparedPairs:
    """Segments of every pair, selected and truncated anew at each reading.

    Nothing of a pair is kept but three lengths and a count, so a million pairs take tens of
    megabytes beside the data. Raises InputError, naming the row, for what the method can't use,
    a token that a model lacks, and a pair longer than `args.max_tokens_per_batch`.
    """

    def __init__(
        self,
        pairs: Sequence[TokenPair],
        args: SePOConfig,
        *,
        attention: float = 0.0,  # cost of a query and a key, in tokens: see `attention_cost`
        vocabularies: Mapping[str, int] | None = None,  # sizes, by what a message calls the model
    ):
        if len(pairs) == 0:
            raise InputError("expected at least one pair, got an empty data set")
        self._pairs = pairs
        method = METHODS[args.method]
        self._selection = selection_of(args)
        counts = np.empty((len(pairs), 4), np.int64)
        hashes = {"contents": ContentHash(PAIRS)}
        if method.needs_score:
            hashes["scores"] = ContentHash(SCORES)
        if method.reference == "logp":
            hashes["ref_logp"] = ContentHash(REF_LOGP)
        for i in range(len(pairs)):
            pair = pairs[i]
            check_tokens(pair, vocabularies or {})
            cut = make_segments(pair, self._selection)
            for one in hashes.values():
                one.add(pair)
            read = [len(cut.prompt), *(len(segment.response) for segment in cut.responses)]
            counts[i] = *read, num_selected(cut)
        self.parts = counts[:, :-1]  # (pairs, 3) tokens read of prompt, chosen and rejected
        self.lengths = self.parts.sum(1)  # (pairs,) tokens read
        self.costs = pair_costs(*self.parts.T, attention=attention)  # (pairs,) in tokens
        self.selected = counts[:, -1]  # (pairs,) tokens used by the loss
        # what the method reads of the pairs, by hash
        self.hashes = {name: one.hexdigest() for name, one in hashes.items()}
        self._refuse_longer_than(args.max_tokens_per_batch)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> CutPair:
        return make_segments(self._pairs[index], self._selection)

    def name(self, index: int) -> str:
        """Say what a message calls a pair."""
        return self._pairs[index].id

    def _refuse_longer_than(self, budget: int | None) -> None:
        longest = int(self.lengths.argmax())
        if budget is not None and self.lengths[longest] > budget:
            raise InputError(
                f"pair {self._pairs[longest].id}: expected at most {budget} tokens "
                f"(--max_tokens_per_batch), got {self.lengths[longest]}, the most of all "
                f"{len(self)} pairs: raise it to that, or lower --max_length"
            )


def selection_of(args: SePOConfig) -> Selection:
    """Which tokens a run uses."""
    method = METHODS[args.method]
    draws_mask = method.mask == "learned" and args.mask_kind == "random"
    return Selection(
        method.positions,
        **selection_flags(args),
        mask="random" if draws_mask else None,
        seed=data_seed(args),
    )


def data_seed(args: SePOConfig) -> int:
    """Seed of the order of the pairs, and of what is drawn for each: sepo-rand, random masks."""
    return args.seed if args.data_seed is None else args.data_seed
