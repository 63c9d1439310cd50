"""Files cut short, swapped, overwritten in the middle, or replaced by something else altogether."""

import random
import shutil
from collections import Counter
from itertools import permutations

import pytest
from hostile.damage import READ, outcome

from sepo.data.store.store import verify_store
from sepo.errors import InputError

PAGE = 512


def cut(data, draw):
    return data[: draw.randrange(len(data))]


def lose_a_page(data, draw):
    start = draw.randrange(0, len(data), PAGE)
    return data[:start] + bytes(len(data[start : start + PAGE])) + data[start + PAGE :]


def repeat_a_page(data, draw):
    start = draw.randrange(0, len(data), PAGE)
    return data[:start] + 2 * data[start : start + PAGE] + data[start + PAGE :]


def swap_two_pages(data, draw):
    a, b = sorted(draw.randrange(0, len(data), PAGE // 8) for _ in range(2))
    size = PAGE // 8
    one, other = data[a : a + size], data[b : b + size]
    return data[:a] + other + data[a + size : b] + one + data[b + size :]


def add(data, draw):
    return data + draw.randbytes(7)


def be_another(data, draw):
    return draw.choice([b"", b"\n", b"{}", b"[]", b"null", b"PAR1", b"PAR1PAR1", b"\x80\x04N.",
                        bytes(len(data)), draw.randbytes(len(data)), b"\xff" * len(data)])  # fmt: skip


DAMAGES = (cut, lose_a_page, repeat_a_page, swap_two_pages, add, be_another)


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file(tmp_path, figures, kind, damage):
    make, read = READ[kind]
    path, draw = make(tmp_path / kind), random.Random(damage.__name__)
    expected, seen, silent = read(path), Counter(), []
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        whole = file.read_bytes()
        for _ in range(10):
            file.write_bytes(damage(whole, draw))
            seen[found := outcome(read, path, expected)] += 1
            silent += [file.name] * (found == "silent")
        file.write_bytes(whole)
    figures("torn files", tried=sum(seen.values()), **seen)
    assert not silent
    assert seen["refused"] > 0 and read(path) == expected


@pytest.mark.parametrize("kind", READ)
def test_something_else_in_the_place_of_a_file(tmp_path, figures, kind):
    """Nothing, a folder, a link to nowhere, a link to itself."""
    make, read = READ[kind]
    path = make(tmp_path / kind)
    expected = read(path)
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        whole = file.read_bytes()
        for put in (lambda f: None, lambda f: f.mkdir(), lambda f: f.symlink_to("nowhere"),
                    lambda f: f.symlink_to(f.name)):  # fmt: skip
            file.unlink()
            put(file)
            with pytest.raises(InputError):
                read(path)
            if file.is_dir():
                file.rmdir()
            else:
                file.unlink(missing_ok=True)
            figures("torn files", tried=1, refused=1)
            file.write_bytes(whole)
    assert read(path) == expected


def test_parts_that_change_places(tmp_path, figures):
    """Each in the place of each, with and without its hidden rows, and all of them in turn."""
    make, read = READ["store"]
    path = make(tmp_path / "store")
    kept = shutil.copytree(path, tmp_path / "kept")
    names = sorted(file.name for file in path.glob("part-*.parquet"))
    for order in list(permutations(names))[1:]:
        for endings in ([".parquet"], [".safetensors"], [".parquet", ".safetensors"]):
            for to, other in zip(names, order, strict=True):
                for ending in endings:
                    swap = lambda name, ending=ending: name.replace(".parquet", ending)
                    shutil.copy(kept / swap(other), path / swap(to))
            for look in (read, verify_store):
                with pytest.raises(InputError, match="expected part"):
                    look(path)
            figures("parts in the place of others", tried=1, refused=1)
            shutil.copytree(kept, path, dirs_exist_ok=True)
    read(path)
