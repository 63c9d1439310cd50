"""What a report says of a store, against the definitions; and that it is plain data."""

import json
from dataclasses import replace

import numpy as np
import pytest
from reports import ids, scored, write_metrics, write_store
from tiny_trainer import make_trainer
from tokenizers_for_tests import chatml_tokenizer, llama2_tokenizer, plain_tokenizer

from sepo.data.counts import count_tokens
from sepo.data.segments import make_segments
from sepo.data.selection import Selection, select_positions
from sepo.errors import InputError
from sepo.report import collect
from sepo.report.charts import METRICS
from sepo.report.ranks import GRID, SHOWN, levels, rank
from sepo.report.runs import read_run
from sepo.report.texts import TokenTexts, visible

TEXTS = (
    "The answer is the river, hello again.",
    "He said that the world is wide.",
    "Rhine",
    "Tell me more. Hello! Hello! The answer: the river is wide, the world is wide.",
)


@pytest.fixture
def pairs():
    texts = [(TEXTS[i % 4], TEXTS[(i + 1) % 4]) for i in range(9)]
    return [scored(f"row {i}", "Tell me", *text, seed=i) for i, text in enumerate(texts)]


@pytest.fixture
def store(tmp_path, pairs):
    return write_store(tmp_path / "store", pairs)


def collected(*stores, runs=(), **options) -> dict:
    return collect(stores, [chatml_tokenizer()] * len(stores), runs, **options)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7, 10, 41])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_levels_ends_and_held_are_those_of_the_selection(num_tokens, side):
    score = np.random.default_rng(num_tokens).integers(-3, 4, num_tokens).astype(np.float32)
    pair = replace(scored(), **{side: np.zeros(num_tokens, np.int32), f"{side}_score": score})
    best = "highest" if side == "chosen" else "lowest"
    level, ranked = levels(pair, side), rank(pair, side)
    for index, share in enumerate(SHOWN):
        wanted = select_positions(score, share, best)
        assert np.flatnonzero(level <= index).tolist() == wanted.tolist()
    gain = np.maximum(score if side == "chosen" else -score, 0)
    for index, share in enumerate(GRID):
        wanted = select_positions(score, share, best)
        assert ranked.counts()[index] == len(wanted)
        assert ranked.ends()[index] == wanted[-1] + 1
        assert ranked.held()[index] == pytest.approx(gain[wanted].sum(), rel=1e-6)


def test_shares_are_what_packing_and_truncation_would_leave(store, pairs):
    (about,) = collected(store)["stores"]
    for index in (0, 9, 29, 30, 49, 99):
        segments = [make_segments(p, Selection("selected", fraction=GRID[index])) for p in pairs]
        counts = count_tokens(pairs, segments)
        expected = counts["packed_truncated"] / counts["packed"]
        assert about["read"][index] == pytest.approx(expected, rel=1e-12)
        for side, place in (("chosen", 1), ("rejected", 2)):
            whole = sum(len(getattr(p, side)) for p in pairs)
            sign = 1 if side == "chosen" else -1
            gains = [np.maximum(sign * getattr(p, f"{side}_score"), 0) for p in pairs]
            held = sum(g[s[place].positions].sum() for g, s in zip(gains, segments, strict=True))
            kept = sum(s[place].positions[-1] + 1 for s in segments)
            selected = sum(len(s[place].positions) for s in segments)
            shares = {name: values[index] for name, values in about["by_share"][side].items()}
            assert shares == pytest.approx(
                {
                    "selected": selected / whole,
                    "kept": kept / whole,
                    "length": kept / len(pairs),
                    "held": held / sum(g.sum() for g in gains),
                },
                rel=1e-5,
            )


def test_counts_by_place_and_by_string(tmp_path):
    assert len(ids("a b ")) == 4
    score = np.array([0, 1, 2, 9], np.float32)
    pairs = [scored(str(i), chosen="a b ", chosen_score=score) for i in range(3)]
    (about,) = collected(write_store(tmp_path / "s", pairs))["stores"]
    places = about["by_place"]["chosen"]
    assert places[17] == 1  # token 3 of 4, at 3.5 / 4
    assert [places[i] for i in (2, 7, 12)] == [0, 0, 0]
    assert sum(place is not None for place in places) == 4
    assert about["by_string"]["chosen"] == [{"token": " ", "selected": 3, "all": 6}]


def test_scores_are_summed_up_on_common_bins(tmp_path, pairs):
    wide = [replace(p, chosen_score=9 * p.chosen_score) for p in pairs]
    stores = write_store(tmp_path / "a", pairs), write_store(tmp_path / "b", wide)
    a, b = collected(*stores)["stores"]
    every = np.concatenate([s for p in pairs for s in (p.chosen_score, p.rejected_score)])
    assert a["spread"] == pytest.approx(every.std(dtype=np.float64), rel=1e-9)
    assert a["scored"] == len(every) == sum(a["tokens"].values())
    assert a["histogram"]["edges"] == b["histogram"]["edges"]
    assert 0.9 < sum(a["histogram"]["chosen"]) <= 1
    chosen = np.concatenate([p.chosen_score for p in pairs])
    assert a["scores"]["chosen"]["mean"] == pytest.approx(chosen.mean(dtype=np.float64))


def test_two_stores_of_the_same_tokens_are_compared(tmp_path, pairs):
    first = write_store(tmp_path / "a", pairs)
    assert collected(first, first)["same_tokens"]["shared"] == [1, 1, 1]
    names = ("chosen_score", "rejected_score")
    turned = [replace(p, **{name: -getattr(p, name) for name in names}) for p in pairs]
    opposite = collected(first, write_store(tmp_path / "b", turned))["same_tokens"]
    assert opposite["rows"] == len(pairs)
    assert max(opposite["shared"]) < 0.15  # short responses select one token of one
    other = write_store(tmp_path / "c", [scored(p.id) for p in pairs])
    assert collected(first, other)["same_tokens"] is None


def test_responses_are_tokens_scores_and_levels(store, pairs):
    data = collected(store, max_pairs=2)
    assert [pair["id"] for pair in data["pairs"]] == ["row 0", "row 1"]
    one = data["pairs"][0]["responses"][0]["chosen"]
    assert "".join(data["strings"][i] for i in one["tokens"]) == TEXTS[0]
    assert one["score"] == [float(f"{value:.3g}") for value in pairs[0].chosen_score]
    assert [int(c) for c in one["level"]] == levels(pairs[0], "chosen").tolist()
    assert data["pairs"][0]["prompt"] == "Tell me"


def test_a_row_that_is_in_one_store_only(tmp_path, store, pairs):
    data = collected(store, write_store(tmp_path / "b", pairs[1:3]))
    first, second = data["pairs"][0]["responses"], data["pairs"][1]["responses"]
    assert first[1] == {"chosen": None, "rejected": None}
    assert second[0]["chosen"] == second[1]["chosen"]


def test_weights_take_the_place_of_scores(tmp_path):
    weight = np.array([0, 1, 0, 2], np.float32)
    none = dict(chosen_score=None, rejected_score=None)
    pair = scored(
        chosen="a b ", rejected="c", chosen_weight=weight, rejected_weight=weight[1:2], **none
    )
    path = write_store(tmp_path / "s", [pair], keep=["weight"])
    data = collected(path)
    (about,) = data["stores"]
    assert data["pairs"][0]["responses"][0]["chosen"]["level"] == "3030"
    assert about["spread"] is about["histogram"] is about["read"] is None
    assert about["by_share"] == {"chosen": None, "rejected": None}
    assert about["by_string"]["chosen"] == [{"token": " ", "selected": 2, "all": 2}]


@pytest.mark.parametrize("tokenizer", [chatml_tokenizer, plain_tokenizer, llama2_tokenizer])
def test_tokens_put_together_read_as_the_text(tokenizer):
    texts = TokenTexts(tokenizer())
    for text in ("The river é 中 😀 is wide", "hello\n\tagain", "👩‍👩‍👧 world"):
        tokens = ids(text, tokenizer())
        each = texts.each(tokens)
        assert len(each) == len(tokens) and "\ufffd" not in "".join(each)
        assert "".join(each).removeprefix(" ") == text
        assert texts.whole(tokens).removeprefix("<s>") == text


def test_special_tokens_and_broken_characters_are_shown():
    tokenizer = chatml_tokenizer()
    texts = TokenTexts(tokenizer)
    tokens = np.append(ids("😀")[:2], ids("<|im_end|>"))  # cut inside a character
    assert texts.each(tokens)[-1] == "<|im_end|>"
    assert "\ufffd" in "".join(texts.each(tokens))


def test_visible():
    assert visible("  a b\n ") == "␣␣a b⏎␣"
    assert visible(" ") == "␣" and visible("\u202ex\x1b") == r"\u{202e}x\u{1b}"


def test_metrics_become_columns(tmp_path):
    folder = write_metrics(
        tmp_path / "run",
        '{"step": 5, "loss": 1.5, "kl": NaN, "note": "text"}',
        '{"step": 10, "loss": 1.0, "kl": 0.25, "eval_loss": 2}',
    )
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "lo')  # is being written
    assert read_run(folder, "r") == {
        "name": "r",
        "metrics": {
            "loss": {"step": [5, 10], "value": [1.5, 1.0]},
            "kl": {"step": [5, 10], "value": [None, 0.25]},
            "eval_loss": {"step": [10], "value": [2]},
        },
    }


@pytest.mark.parametrize("line", ["{", "[]", '{"loss": 1}', "1"])
def test_a_line_that_is_no_metrics(tmp_path, line):
    folder = write_metrics(tmp_path / "run", '{"step": 1, "loss": 1}', line)
    with pytest.raises(InputError, match="line 2: expected a JSON object with a step"):
        read_run(folder, "r")


def test_collected_data_survives_json(tmp_path, store):
    run = write_metrics(tmp_path / "run", '{"step": 1, "loss": Infinity}')
    data = collected(store, store, runs=[run])
    assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_a_store_is_opened_with_its_own_tokenizer(store):
    with pytest.raises(InputError, match="scored with tokenizer"):
        collect([store], [plain_tokenizer()])


def test_all_rows_count_whatever_is_shown(store):
    assert collected(store, max_pairs=0)["stores"] == collected(store)["stores"]


def test_the_curves_are_of_metrics_that_a_run_logs(tmp_path):
    make_trainer(tmp_path, method="sparsepo", independent_masks=True, max_steps=1).train()
    logged = read_run(tmp_path, "run")["metrics"].keys()
    assert {name for _, _, names in METRICS for name in names} <= logged
