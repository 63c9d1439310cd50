"""One pytest-benchmark entry a case and provider; the rounds of a case take turns."""

import pytest


def test_speed(case, provider, measured, request):
    row = measured(case)[provider.name]
    if row.status == "refused" and provider.ours:
        pytest.fail(f"refused: {row.reason}", pytrace=False)
    if row.status != "measured":
        pytest.skip(f"{row.status}: {row.reason}")
    benchmark = request.getfixturevalue("benchmark")
    # its own loop cannot interleave: the rounds are made elsewhere, and handed to its statistics
    benchmark._mode, benchmark.group = "interleaved", case.name
    statistics = benchmark._make_stats(iterations=1)
    for seconds in row.seconds:
        statistics.update(seconds)
    benchmark.extra_info.update(errors=row.errors, extra_bytes=row.extra_bytes, note=row.note)
