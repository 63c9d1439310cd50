"""A bit that turns over on a disk: the file is refused, or nothing that is read is another."""

import random
from collections import Counter

import pytest
from hostile.damage import READ, outcome
from whole_stores import flip

FLIPS = {"store": 800, "checkpoint": 400}
MOST = 5  # silent ones of all flips


@pytest.mark.parametrize("kind", READ)
def test_flips_over_all_files(tmp_path, figures, kind):
    make, read = READ[kind]
    path, draw = make(tmp_path / kind), random.Random(kind)
    expected, files = read(path), sorted(file for file in path.rglob("*") if file.is_file())
    seen, silent = Counter(), []
    for number in range(FLIPS[kind]):
        file = files[number % len(files)]
        bit = draw.randrange(8 * file.stat().st_size)
        flip(file, bit)
        seen[found := outcome(read, path, expected)] += 1
        flip(file, bit)
        if found == "silent":
            silent.append(f"bit {bit} of {file.name}")
    figures(f"bit flips in a {kind}", tried=FLIPS[kind], **seen)
    print(f"{kind}: {FLIPS[kind]} flips in {len(files)} files: {dict(seen)}")
    assert read(path) == expected
    assert len(silent) <= MOST * FLIPS[kind] // sum(FLIPS.values()), silent
    assert seen["refused"] > FLIPS[kind] // 2
