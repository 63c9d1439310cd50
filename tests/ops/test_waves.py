"""Chunks that fill a GPU in whole waves: a function of sizes, with no GPU at hand."""

import pytest

from sepo_kernels.configs import RESIDENT_ROWS
from sepo_kernels.waves import TILE_ROWS, chunk_rows, last_wave, working_rows

H200, A100 = 132, 108
# rows of the benchmark's cases, and of KL's
LARGE = [(M, 128256, 4096) for M in (2457, 4096, 6144, 8192)]


def chunks(M, rows) -> list[int]:
    return [min(rows, M - start) for start in range(0, M, rows)]


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(("M", "V", "D"), LARGE)
def test_no_wave_of_the_benchmark_is_less_than_60_percent_full(M, V, D, heads):
    at_once = H200 * RESIDENT_ROWS[heads]
    rows = chunk_rows(M, working_rows(H200, heads), V, D, H200, heads)
    sizes = chunks(M, rows)
    assert min(last_wave(size, at_once) for size in sizes) >= 0.6, sizes
    # as few waves as M rows can have, and no tile of a product wasted
    assert sum(-(-size // at_once) for size in sizes) == -(-M // at_once)
    assert sum(-(-size // TILE_ROWS) for size in sizes) == -(-M // TILE_ROWS)


def test_the_chunk_of_819_rows_that_took_two_waves(monkeypatch):
    monkeypatch.setitem(RESIDENT_ROWS, 1, 6)
    chunk_rows.cache_clear()
    assert last_wave(819, H200 * 6) < 0.04
    assert chunk_rows(8192, 819, 128256, 4096, H200, 1) == 768
    chunk_rows.cache_clear()


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("multiprocessors", [H200, A100, 20])
def test_within_the_limit_for_any_sizes(multiprocessors, heads):
    for M in (0, 1, 127, 128, 500, 1585, 5000, 33333):
        for limit in (1, 5, 127, 128, 700, 1584, 4000):
            rows = chunk_rows(M, limit, 50257, 768, multiprocessors, heads)
            assert 1 <= rows <= limit
            assert rows == max(1, M) if M <= limit else sum(chunks(M, rows)) == M
            assert M <= limit or limit < TILE_ROWS or rows % TILE_ROWS == 0


def test_a_last_wave():
    assert [last_wave(n, 4) for n in (1, 3, 4, 5, 8)] == [0.25, 0.75, 1, 0.25, 1]
