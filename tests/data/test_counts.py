import numpy as np

from sepo.data import TokenPair
from sepo.data.counts import count_rows, count_tokens
from sepo.data.segments import make_segments
from sepo.data.selection import Selection


def test_layouts_by_hand():
    make = lambda p, c, r: TokenPair(
        id="", prompt=np.zeros(p, "i4"), chosen=np.zeros(c, "i4"), rejected=np.zeros(r, "i4")
    )
    pairs = [make(2, 3, 5)] * 8 + [make(1, 1, 1)]
    segments = [make_segments(pair, Selection("all")) for pair in pairs]
    assert count_tokens(pairs, segments) == {
        "padded_unshared": 8 * 2 * (2 + 5) + 2 * 2,
        "packed_unshared": 8 * (5 + 7) + 4,
        "packed": 8 * 10 + 3,
        "packed_truncated": 8 * (2 + 2 + 4) + 1,
    }
    assert count_rows(pairs, segments) == {"response": 8 * 8 + 2, "selected": 8 * 8 + 2}
