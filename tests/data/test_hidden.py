"""The reference's rows on disk: read where they are asked for, refused where they are not whole."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from manifests import manifest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sepo.data import all_positions, pack, truncate
from sepo.data.hidden import HEAD_FILE, HiddenFile, HiddenRows, StoredHead, check_room, size_name
from sepo.data.store.store import ScoredStore, StoreWriter
from sepo.data.types import ScoredPair
from sepo.errors import InputError

D, V = 3, 5
HEAD = StoredHead(torch.arange(15.0).reshape(V, D), torch.arange(5.0), 0.5, 30.0)
LENGTHS = [(2, 4), (1, 1), (3, 2)]  # (T1, T2) of each pair; two pairs a part


def make_pairs():
    rows = torch.randn(13, D, generator=torch.manual_seed(0)).bfloat16()
    pairs, end = [], 0
    for name, lengths in zip("abc", LENGTHS, strict=True):
        fields = {"prompt": np.arange(2, dtype=np.int32)}
        for side, count in zip(("chosen", "rejected"), lengths, strict=True):
            fields[side] = np.arange(count, dtype=np.int32)
            fields[f"{side}_ref_hidden"] = HiddenRows(rows, end, count)
            end += count
        pairs.append(ScoredPair(id=name, **fields))
    return pairs


def fill(path, parts=None, head=HEAD, **entries):
    entries = {"hidden_width": D, "hidden_dtype": "bfloat16", "pairs": 3} | entries
    writer = StoreWriter(path, manifest(pairs_per_part=2, **entries))
    writer.write_head(head)
    for part in writer.missing() if parts is None else parts:
        writer.write(part, [make_pairs()[i] for i in writer.pairs_of(part)])
    writer.finish()
    return path


def test_a_part_is_not_written_without_the_rows_it_keeps(tmp_path):
    writer = StoreWriter(tmp_path, manifest(hidden_width=D, pairs=3, pairs_per_part=2))
    writer.write_head(HEAD)
    one, other = make_pairs()[:2]
    with pytest.raises(ValueError, match="expected 4 responses with hidden rows, got 3"):
        writer.write(0, [one, replace(other, chosen_ref_hidden=None)])
    assert not list(tmp_path.glob("part-*"))


def whole(rows):
    return rows.read(all_positions(len(rows)))


def test_round_trip(tmp_path):
    store = ScoredStore.open(fill(tmp_path))
    for found, given in zip(store.pairs(), make_pairs(), strict=True):
        for side in ("chosen_ref_hidden", "rejected_ref_hidden"):
            assert torch.equal(whole(getattr(found, side)), whole(getattr(given, side)))
    some = store[0].rejected_ref_hidden.read(np.array([0, 3], np.int32))
    assert torch.equal(some, whole(make_pairs()[0].rejected_ref_hidden)[[0, 3]])
    head = store.reference_head()
    assert torch.equal(head.weight, HEAD.weight) and torch.equal(head.bias, HEAD.bias)
    assert (head.scale, head.softcap) == (0.5, 30.0)


def test_a_head_without_bias_keeps_its_dtype(tmp_path):
    head = StoredHead(HEAD.weight.half(), None, 1.0, None)
    assert ScoredStore.open(fill(tmp_path, head=head)).reference_head().weight.dtype == torch.half
    assert ScoredStore.open(tmp_path).reference_head()[1:] == (None, 1.0, None)


def test_no_row_is_read_before_packing(tmp_path, monkeypatch):
    reads, read = [], HiddenFile.__getitem__
    spy = lambda self, where: (
        reads.append((self.path.name, where.start, where.stop)) or read(self, where)
    )
    monkeypatch.setattr(HiddenFile, "__getitem__", spy)
    store = ScoredStore.open(fill(tmp_path))
    pair, positions = store[2], np.array([1], np.int32)
    chosen = truncate(pair.chosen, positions, ref_hidden=pair.chosen_ref_hidden)
    rejected = truncate(pair.rejected, positions, ref_hidden=pair.rejected_ref_hidden)
    assert reads == []
    batch = pack([(pair.prompt, chosen, rejected)])
    assert [where[1:] for where in reads] == [(0, 3), (3, 5)]
    given = make_pairs()[2]
    expected = [whole(given.chosen_ref_hidden)[1], whole(given.rejected_ref_hidden)[1]]
    assert torch.equal(batch.ref_hidden, torch.stack(expected))


def test_rows_travel_to_another_process_as_a_path(tmp_path):
    rows = ScoredStore.open(fill(tmp_path))[1].chosen_ref_hidden
    expected = whole(rows)
    data = pickle.dumps(rows)
    assert len(data) < 500
    assert torch.equal(whole(pickle.loads(data)), expected)


def test_the_same_rows_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        fill(tmp_path / name)
    for file in (tmp_path / "a").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def rows_file(path):
    return path / "part-00001-of-00002.safetensors"


def test_a_part_without_its_rows_is_missing(tmp_path):
    before = rows_file(fill(tmp_path)).read_bytes()
    rows_file(tmp_path).unlink()
    with pytest.raises(InputError, match=r"1 of 2 parts are missing \(1\)"):
        ScoredStore.open(tmp_path)
    assert rows_file(fill(tmp_path)).read_bytes() == before


def test_a_missing_head(tmp_path):
    (fill(tmp_path) / HEAD_FILE).unlink()
    with pytest.raises(InputError, match=f"{HEAD_FILE} is missing; run the same `sepo score`"):
        ScoredStore.open(tmp_path)
    ScoredStore.open(fill(tmp_path))


@pytest.mark.parametrize("name", [HEAD_FILE, "part-00001-of-00002.safetensors"])
@pytest.mark.parametrize("left", [-3, 4])
def test_a_torn_file(tmp_path, name, left):
    file = fill(tmp_path) / name
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(InputError, match=f"{name}: cannot be read .*; delete it and score again"):
        ScoredStore.open(tmp_path)


@pytest.mark.parametrize("name", [HEAD_FILE, "part-00001-of-00002.safetensors"])
def test_a_file_of_another_run(tmp_path, name):
    fill(tmp_path / "a", reference="a")
    fill(tmp_path / "b", reference="b")
    (tmp_path / "a" / name).replace(tmp_path / "b" / name)
    with pytest.raises(InputError, match=f"{name}: written by another run"):
        ScoredStore.open(tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: {"hidden": rows[1:]}, r"expected hidden \(5, 3\) BF16, found \(4, 3\) BF16"),
        (lambda rows: {"hidden": rows[:, 1:].contiguous()}, r"found \(5, 2\) BF16"),
        (lambda rows: {"hidden": rows.half()}, r"found \(5, 3\) F16"),
        (lambda rows: {"states": rows}, r"expected one tensor, hidden, found \['states'\]"),
    ],
)
def test_rows_of_another_shape(tmp_path, change, message):
    file = rows_file(fill(tmp_path))
    about = safe_metadata(file)
    save_file(change(load_file(file)["hidden"]), file, metadata=about)
    with pytest.raises(InputError, match=message):
        ScoredStore.open(tmp_path)


def test_a_head_of_another_width(tmp_path):
    fill(tmp_path, head=HEAD._replace(weight=torch.zeros(V, D + 1)))
    with pytest.raises(InputError, match=r"expected a weight of width 3, found \(5, 4\)"):
        ScoredStore.open(tmp_path)


def safe_metadata(file):
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def test_a_file_that_vanishes_is_named(tmp_path):
    rows = ScoredStore.open(fill(tmp_path))[2].chosen_ref_hidden
    rows_file(tmp_path).unlink()
    with pytest.raises(InputError, match="part-00001-of-00002.safetensors is missing"):
        whole(rows)


def test_a_mixed_batch_has_no_rows(tmp_path):
    pair = make_pairs()[0]
    cut = lambda p, side: truncate(
        getattr(p, side), np.array([0], np.int32), ref_hidden=getattr(p, f"{side}_ref_hidden")
    )
    segments = (pair.prompt, cut(pair, "chosen"), cut(pair, "rejected"))
    assert pack([segments]).ref_hidden.shape == (2, D)
    without = (
        pair.prompt,
        cut(pair, "chosen"),
        cut(replace(pair, rejected_ref_hidden=None), "rejected"),
    )
    assert pack([segments, without]).ref_hidden is None


def test_a_disk_without_room(tmp_path):
    check_room(tmp_path / "not" / "there", 1)
    with pytest.raises(InputError, match="rows take 100 TB, but the disk has .* left"):
        check_room(tmp_path / "not" / "there", 10**14)


def test_sizes_in_words():
    assert [size_name(n) for n in (0, 999, 1234567890)] == ["0 bytes", "999 bytes", "1.23 GB"]
