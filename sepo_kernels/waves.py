"""Chunk sizes that fill a GPU in whole waves, a wave being all rows that run at once.

A wave that is nearly empty takes as long as a full one, so 819 rows on a GPU that holds 792 take
two. The choice is a function of sizes and of the number of multiprocessors: nothing is measured.
"""

from functools import lru_cache

from sepo_kernels.configs import RESIDENT_ROWS

# rows and columns of a GEMM that a multiprocessor computes at once, as libraries cut large ones
TILE_ROWS, TILE_COLUMNS = 128, 256
ENOUGH_ROWS = 1024  # of a GEMM, which reads the weight once a chunk: more only take memory
# FLOP of a GEMM in the time of a byte of memory, on an H200 (790 TFLOP/s, 4.3 TB/s); the choice
# hardly depends on it
FLOP_PER_BYTE = 184
# rows of a GEMM that adds to a float32 sum, 8 bytes an entry: with fewer, memory is its limit
ADDING_ROWS = 4 * FLOP_PER_BYTE // TILE_ROWS * TILE_ROWS + TILE_ROWS
# sizes whose work differs by less are equally quick, and a last wave need be no fuller than that
ALIKE, FULL_ENOUGH = 1.03, 0.6


def working_rows(multiprocessors: int, heads: int) -> int:
    """Return the rows of a chunk that are as good as any more: one wave, on a large GPU."""
    return max(ENOUGH_ROWS, multiprocessors * RESIDENT_ROWS[heads])


@lru_cache(maxsize=256)
def chunk_rows(
    total: int,  # rows to be cut
    limit: int,  # rows that there is room for, at least 1
    V: int,
    D: int,
    multiprocessors: int,
    heads: int,
) -> int:
    """Return the rows of each chunk but the last: all if there is room, else whole tiles.

    Of equally quick sizes the one whose last waves are fullest, then the largest.
    """
    if total <= limit:
        return max(1, total)
    if limit < TILE_ROWS:
        return limit
    at_once = multiprocessors * RESIDENT_ROWS[heads]

    def sizes(rows: int) -> dict[int, int]:  # of the chunks, and how many have it
        return {rows: total // rows} | ({total % rows: 1} if total % rows else {})

    work = {
        rows: sum(
            n * _work(size, V, D, multiprocessors, at_once) for size, n in sizes(rows).items()
        )
        for rows in range(TILE_ROWS, limit + 1, TILE_ROWS)
    }
    alike = [rows for rows, amount in work.items() if amount <= ALIKE * min(work.values())]
    fill = lambda rows: min(last_wave(size, at_once) for size in sizes(rows))
    return max(alike, key=lambda rows: (min(fill(rows), FULL_ENOUGH), rows))


def last_wave(count: int, at_once: int) -> float:
    """Return how full the last wave of `count` programs is, above 0 to 1."""
    return (count - 1) % at_once / at_once + 1 / at_once


def _work(rows: int, V: int, D: int, multiprocessors: int, at_once: int) -> float:
    """Return a chunk's time in FLOP: its logits, then a pass over them of 8 bytes an entry."""
    tiles = -(-rows // TILE_ROWS) * -(-V // TILE_COLUMNS)
    tile = 2 * TILE_ROWS * TILE_COLUMNS * D
    gemm = -(-tiles // multiprocessors) * multiprocessors * tile
    return gemm + -(-rows // at_once) * at_once * V * 8 * FLOP_PER_BYTE
