"""The scored store: what goes in comes out, and what is wrong is named."""

import hashlib
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from manifests import manifest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sepo.data.store.store import (
    FORMAT,
    ScoredStore,
    StoreWriter,
    is_store,
    pairs_hash,
    template_hash,
    tokenizer_hash,
)
from sepo.data.types import ScoredPair, TokenPair
from sepo.errors import InputError
from sepo.system.lock import lock

FIELDS = list(ScoredPair.__dataclass_fields__)


def make_tokenizer(words="a b c", template=None):
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", *words.split()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>", chat_template=template
    )


def make_pair(name="a", length=3, **fields):
    ids = np.arange(length, dtype=np.int32)
    score = np.linspace(-1, 1, length, dtype=np.float32)
    given = dict(prompt=ids, chosen=ids, rejected=ids, chosen_score=score, rejected_score=-score)
    return ScoredPair(id=name, **{**given, **fields})


def make_manifest(pairs, pairs_per_part=2, **entries):
    source = {"source": pairs_hash(pairs), "pairs": len(pairs), "pairs_per_part": pairs_per_part}
    return manifest(**source, **entries)


def fill(path, pairs, parts=None, **entries):
    writer = StoreWriter(path, make_manifest(pairs, **entries))
    for part in writer.missing() if parts is None else parts:
        writer.write(part, [pairs[i] for i in writer.pairs_of(part)])
    writer.finish()
    return writer


def same(a, b):
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in FIELDS)


tokens = lambda n: st.lists(st.integers(0, 2**31 - 1), min_size=n, max_size=n)
floats = lambda n: st.lists(
    st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=n, max_size=n
)


@st.composite
def scored_pairs(draw):
    fields = {"id": draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=5))}
    for side in ("prompt", "chosen", "rejected"):
        length = draw(st.integers(1, 5))
        fields[side] = np.array(draw(tokens(length)), np.int32)
        for kind in ("score", "ref_logp", "weight") if side != "prompt" else ():
            values = draw(st.none() | floats(length))
            fields[f"{side}_{kind}"] = None if values is None else np.array(values, np.float32)
    return ScoredPair(**fields)


@settings(max_examples=60, deadline=None)
@given(st.lists(scored_pairs(), min_size=1, max_size=7), st.integers(1, 4))
def test_round_trip(pairs, pairs_per_part):
    with tempfile.TemporaryDirectory() as path:
        fill(path, pairs, pairs_per_part=pairs_per_part)
        store = ScoredStore.open(path)
    assert len(store) == len(pairs)
    assert all(same(a, b) for a, b in zip(store.pairs(), pairs, strict=True))
    assert same(store[-1], pairs[-1])
    expected = [[len(p.prompt), len(p.chosen), len(p.rejected)] for p in pairs]
    assert store.lengths.tolist() == expected
    assert store.manifest["complete"] and store.manifest["tokens"] == sum(map(len, pairs))


def test_values_are_the_callers_own(tmp_path):
    fill(tmp_path, [make_pair()])
    store = ScoredStore.open(tmp_path)
    store[0].chosen_score[:] = 7  # writable, and the store does not change with it
    assert same(store[0], make_pair())


def test_index_out_of_range(tmp_path):
    fill(tmp_path, [make_pair()])
    with pytest.raises(IndexError):
        ScoredStore.open(tmp_path)[1]


def test_missing_parts_are_named_and_filled_in(tmp_path):
    pairs = [make_pair(str(i)) for i in range(7)]
    fill(tmp_path, pairs, parts=[0, 2])
    assert not json.loads((tmp_path / "manifest.json").read_text())["complete"]
    with pytest.raises(InputError, match=r"2 of 4 parts are missing \(1, 3\).*`sepo score`"):
        ScoredStore.open(tmp_path)
    assert StoreWriter(tmp_path, make_manifest(pairs)).missing() == [1, 3]
    fill(tmp_path, pairs)
    assert [p.id for p in ScoredStore.open(tmp_path).pairs()] == list("0123456")


def test_completeness_is_read_from_the_parts(tmp_path):
    """Killed between the last part and the manifest: the store is whole. And the other way round."""
    pairs = [make_pair(str(i)) for i in range(3)]
    writer = StoreWriter(tmp_path, make_manifest(pairs))
    for part in (0, 1):
        writer.write(part, [pairs[i] for i in writer.pairs_of(part)])
    assert ScoredStore.open(tmp_path).manifest["complete"]
    assert writer.finish() and writer.finish()
    next(tmp_path.glob("part-00001*")).unlink()
    with pytest.raises(InputError, match="1 of 2 parts are missing"):
        ScoredStore.open(tmp_path)


def leave(folder, owner):
    """What a writer that was killed between two files leaves."""
    (left := folder / f".part-0.{owner}.tmp").mkdir()
    (left / "part-0").touch(), (left / ".tmpXyZ").touch()  # safetensors' own
    return left


def test_a_writer_removes_what_dead_ones_left(tmp_path):
    """Whatever number of shards theirs was one of; with a lock, as a kill leaves it, or without."""
    pairs = [make_pair()]
    fill(tmp_path, pairs)
    before = sorted(tmp_path.iterdir())
    for owner in ("shard0of1", "shard1of4", "shard2of4"):
        leave(tmp_path, owner)
    for owner in ("shard1of4", "shard3of4"):
        (tmp_path / f".{owner}.lock").write_text("process 1 on another machine")
    (tmp_path / ".part-00000-of-00001.parquet.shard1of2.tmp").write_text("of an older version")
    StoreWriter(tmp_path, make_manifest(pairs), owner="shard0of1")
    assert sorted(tmp_path.iterdir()) == before


def test_a_writer_leaves_what_living_ones_have(tmp_path):
    pairs = [make_pair()]
    fill(tmp_path, pairs)
    left = leave(tmp_path, "living")
    with ThreadPoolExecutor(1) as other, lock(tmp_path, "living"):
        other.submit(StoreWriter, tmp_path, make_manifest(pairs), owner="mine").result()
        assert len(list(left.iterdir())) == 2 and (tmp_path / ".living.lock").exists()
    StoreWriter(tmp_path, make_manifest(pairs), owner="mine")
    assert not left.exists()


@pytest.mark.parametrize("owner", ["0", "1"])
def test_a_stale_plain_file_in_the_way(tmp_path, owner):
    """Where a temporary folder belongs; older versions wrote such files."""
    pairs = [make_pair()]
    writer = StoreWriter(tmp_path, make_manifest(pairs))
    (tmp_path / ".part-00000-of-00001.parquet.0.tmp").write_text("half")
    (tmp_path / f".manifest.json.{owner}.tmp").symlink_to(tmp_path / "nowhere")
    writer.write(0, pairs)
    assert writer.finish() and same(ScoredStore.open(tmp_path)[0], pairs[0])


def test_a_failed_write_leaves_nothing(tmp_path):
    writer = StoreWriter(tmp_path, make_manifest([make_pair()]))
    with pytest.raises((pa.ArrowException, TypeError)):
        writer.write(0, [make_pair(chosen_score=np.array(["x"]))])
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_no_store(tmp_path):
    with pytest.raises(InputError, match="expected a scored store, found no manifest.json"):
        ScoredStore.open(tmp_path)


def test_another_format_version(tmp_path):
    fill(tmp_path, [make_pair()])
    file = tmp_path / "manifest.json"
    file.write_text(file.read_text().replace(f'"format": {FORMAT}', '"format": 99'))
    with pytest.raises(InputError, match=f"expected format version {FORMAT}, found 99"):
        ScoredStore.open(tmp_path)


@pytest.mark.parametrize("text", ["not json", "[]", "{}"])
def test_broken_manifest(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match="expected the JSON manifest of a scored store"):
        ScoredStore.open(tmp_path)


def test_another_run_in_the_directory(tmp_path):
    fill(tmp_path, [make_pair()], oracle="aaa")
    with pytest.raises(InputError, match=r"another oracle weights \(aaa, this run: bbb\)"):
        fill(tmp_path, [make_pair()], oracle="bbb")
    with pytest.raises(InputError, match="another data"):
        fill(tmp_path, [make_pair("b")], oracle="aaa")


def test_parts_without_manifest(tmp_path):
    fill(tmp_path, [make_pair()])
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(InputError, match="found part-.*parquet without manifest.json"):
        fill(tmp_path, [make_pair()])


def test_part_of_another_run(tmp_path):
    fill(tmp_path / "a", [make_pair("a")])
    fill(tmp_path / "b", [make_pair("b")])
    part = next((tmp_path / "a").glob("part*"))
    part.replace(tmp_path / "b" / part.name)
    with pytest.raises(InputError, match=f"{part.name}: written by another run"):
        ScoredStore.open(tmp_path / "b")


def test_truncated_part(tmp_path):
    fill(tmp_path, [make_pair()])
    part = next(tmp_path.glob("part*"))
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(InputError, match=f"{part.name}: cannot be read"):
        ScoredStore.open(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["chosen_score", "rejected_ref_logp"])
def test_values_that_are_not_finite(tmp_path, field, value):
    bad = make_pair("bad one", **{field: np.array([0, value, 0], np.float32)})
    fill(tmp_path, [make_pair("a"), make_pair("b"), make_pair("c"), bad])
    message = f"pair bad one: expected finite values in {field}, found {value} at position 1"
    with pytest.raises(InputError, match=message):
        ScoredStore.open(tmp_path)


def test_lists_of_different_length(tmp_path):
    fill(tmp_path, [make_pair("a"), make_pair("b", chosen_weight=np.ones(2, np.float32))])
    message = "pair b: expected 3 values in chosen_weight, one per chosen token, found 2"
    with pytest.raises(InputError, match=message):
        ScoredStore.open(tmp_path)


def test_empty_response(tmp_path):
    nothing = np.zeros(0, np.int32)
    fill(tmp_path, [make_pair("a", rejected=nothing, rejected_score=nothing)])
    with pytest.raises(InputError, match="pair a: rejected is empty"):
        ScoredStore.open(tmp_path)


def test_other_columns(tmp_path):
    fill(tmp_path, [make_pair()])
    part = next(tmp_path.glob("part*"))
    pq.write_table(pq.read_table(part, partitioning=None).drop_columns("chosen_weight"), part)
    with pytest.raises(InputError, match="expected columns .* found"):
        ScoredStore.open(tmp_path)


def test_wrong_number_of_pairs(tmp_path):
    writer = StoreWriter(tmp_path, make_manifest([make_pair("a"), make_pair("b")]))
    writer.write(0, [make_pair("a")])
    with pytest.raises(InputError, match="expected 2 pairs, found 1"):
        ScoredStore.open(tmp_path)


def test_another_tokenizer(tmp_path):
    mine, other = make_tokenizer(), make_tokenizer("a c b")
    entries = {"tokenizer": tokenizer_hash(mine), "tokenizer_name": "mine"}
    fill(tmp_path, [make_pair()], **entries)
    ScoredStore.open(tmp_path, tokenizer=mine)
    hashes = rf"mine \({tokenizer_hash(mine)[:12]}\), got .* \({tokenizer_hash(other)[:12]}\)"
    with pytest.raises(InputError, match=f"scored with tokenizer {hashes}"):
        ScoredStore.open(tmp_path, tokenizer=other)


def test_tokenizer_hash_ignores_what_does_not_change_tokens(tmp_path):
    tokenizer = make_tokenizer()
    expected = tokenizer_hash(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["a b", "a b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(tokenizer) == expected
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path)) == expected


def test_tokenizer_hash_sees_what_does():
    changed = make_tokenizer()
    changed.add_tokens(["new"])
    no_end = make_tokenizer()
    no_end.eos_token = "a"
    others = [make_tokenizer("b a c"), make_tokenizer("a b c d"), changed, no_end]
    assert len({tokenizer_hash(t) for t in [make_tokenizer(), *others]}) == 5


def test_tokenizer_hash_sees_what_is_put_before_a_text(tmp_path):
    with_bos, without = make_tokenizer(), make_tokenizer()
    bos = processors.TemplateProcessing(single="b $A", special_tokens=[("b", 1)])
    with_bos.backend_tokenizer.post_processor = bos
    after = make_tokenizer()  # what is put behind a text is left out where a response follows
    after.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A b", special_tokens=[("b", 1)]
    )
    assert tokenizer_hash(with_bos) != tokenizer_hash(without) == tokenizer_hash(after)
    fill(tmp_path / "new", [make_pair()], tokenizer=tokenizer_hash(without), tokenizer_name="x")
    with pytest.raises(InputError, match="scored with tokenizer x"):
        ScoredStore.open(tmp_path / "new", tokenizer=with_bos)
    # a hash as older versions made it says nothing of that
    state = json.loads(without.backend_tokenizer.to_str())
    parts = {k: state[k] for k in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    tokens = {k: getattr(without, k) for k in ("bos_token", "eos_token", "unk_token")}
    text = json.dumps([parts, tokens], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    old = hashlib.sha256(text.encode()).hexdigest()
    fill(tmp_path / "old", [make_pair()], tokenizer=old, tokenizer_name="x")
    for tokenizer in (without, with_bos):
        ScoredStore.open(tmp_path / "old", tokenizer=tokenizer)
    with pytest.raises(InputError, match="scored with tokenizer x"):
        ScoredStore.open(tmp_path / "old", tokenizer=make_tokenizer("a c b"))


def test_template_hash():
    templates = [None, "{{ messages }}", "{{ messages }}!"]
    assert len({template_hash(make_tokenizer(template=t)) for t in templates}) == 3
    assert template_hash(make_tokenizer()) == "none"


def test_pairs_hash_sees_every_field_and_boundary():
    array = lambda *ids: np.array(ids, np.int32)
    pair = lambda name, p, c, r, **kw: TokenPair(id=name, prompt=p, chosen=c, rejected=r, **kw)
    one, weight = array(1), np.ones(1, np.float32)
    sets = [
        [pair("a", one, one, one)],
        [pair("b", one, one, one)],
        [pair("a", array(2), one, one)],
        [pair("a", array(1, 1), one, one)],
        [pair("a", one, array(1, 1), one)],
        [pair("a", one, one, one, chosen_weight=weight)],
        [pair("a", one, one, one, rejected_weight=weight)],
        [pair("a", one, one, one), pair("a", one, one, one)],
    ]
    assert len({pairs_hash(pairs) for pairs in sets}) == len(sets)
    assert pairs_hash(sets[0]) == pairs_hash([pair("a", one.astype(np.int64), one, one)])


def test_a_token_id_that_is_none_in_an_old_part(tmp_path):
    fill(tmp_path, [make_pair("a"), make_pair("b", chosen=np.array([1, -5, 2], np.int32))])
    part = next(tmp_path.glob("part*"))
    table = pq.ParquetFile(part).read()
    about = json.loads(table.schema.metadata[b"sepo"])
    del about["check"]
    pq.write_table(table.replace_schema_metadata({"sepo": json.dumps(about)}), part)
    with pytest.raises(InputError, match="pair b: expected token ids in chosen, found -5"):
        ScoredStore.open(tmp_path)


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", ""])
def test_a_path_that_can_be_none(path):
    assert not is_store(path)
