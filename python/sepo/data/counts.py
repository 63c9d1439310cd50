"""How many tokens the trunk would read of the same pairs in another layout."""

from collections.abc import Sequence

from sepo.data.segments import num_selected, num_tokens
from sepo.data.types import CutPair, TokenPair

PADDED_BATCH = 8  # pairs padded to one length, transformers' default batch


def count_tokens(
    pairs: Sequence[TokenPair],
    segments: Sequence[CutPair],  # the same pairs after selection and truncation
) -> dict[str, int]:
    """Tokens of the trunk, summed over all pairs, in four layouts, each with one saving more.

    "padded_unshared": every response behind a prompt of its own, eight pairs at a time padded to
    the longest, in the order of the data; "packed_unshared": the same without padding; "packed":
    the prompt once; "packed_truncated": each response cut after its last selected token as well.
    """
    padded = 0
    for start in range(0, len(pairs), PADDED_BATCH):
        group = [pairs[i] for i in range(start, min(start + PADDED_BATCH, len(pairs)))]
        longest = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in group)
        padded += 2 * len(group) * longest
    return {
        "padded_unshared": padded,
        "packed_unshared": sum(len(p.prompt) + len(p) for p in pairs),
        "packed": sum(map(len, pairs)),
        "packed_truncated": sum(map(num_tokens, segments)),
    }


def count_rows(pairs: Sequence[TokenPair], segments: Sequence[CutPair]) -> dict[str, int]:
    """Rows of the head: of all response tokens, and of the selected ones."""
    return {
        "response": sum(len(p.chosen) + len(p.rejected) for p in pairs),
        "selected": sum(map(num_selected, segments)),
    }
