import json

import pytest
from characters import character_tokenizer

from sepo.demo.sample import Completion


@pytest.fixture
def make_pairs(monkeypatch, pytestconfig):
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "examples" / "sentiment")
    import make_pairs

    return make_pairs


@pytest.fixture
def complete():
    tokenizer = character_tokenizer()

    def make(opening: int, prompt: str, text: str, end: tuple[int, ...] = ()) -> Completion:
        ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
        return Completion(opening, ids(prompt), [*ids(text), *end], text)

    return make


def test_best_and_worst_become_the_pair(make_pairs, complete, tmp_path):
    openings = ["The film is", "The play is"]
    texts = [(0, " good"), (0, " a film"), (0, " awful"), (0, " great"), (1, " fine"), (1, " nice")]
    completions = [complete(i, openings[i], text) for i, text in texts]
    rows, counts = make_pairs.make_rows("t", openings, completions, character_tokenizer(), 0.5)
    assert [(r["id"], r["prompt"]) for r in rows] == [("t-000", "The film is")]
    assert (rows[0]["chosen"], rows[0]["rejected"]) == (" great", " awful")
    assert rows[0]["chosen_reward"] > 0 > rows[0]["rejected_reward"]
    assert counts["openings skipped: too few samples or too small a gap"] == 1
    make_pairs.write_jsonl(tmp_path / "rows.jsonl", rows)
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows


@pytest.mark.parametrize(
    "text, end, fault",
    [
        (" good", (), None),
        (" good", (1,), "ended early"),
        (" good", (0,), "ended early"),
        ("good", (), "does not begin with a space"),
        ("  ", (), "does not begin with a space"),
    ],
)
def test_what_a_plain_string_cannot_hold_is_dropped(make_pairs, complete, text, end, fault):
    completion = complete(0, "It is", text, end)
    assert make_pairs.unclean("It is", completion, character_tokenizer()) == fault


def test_half_a_character_is_dropped(make_pairs):
    completion = Completion(0, [5, 6], [7, 8], " go\ufffd")
    assert make_pairs.unclean("It", completion, character_tokenizer()) == "broken unicode"


def test_other_tokens_for_the_same_text_are_dropped(make_pairs, complete):
    completion = complete(0, "It is", " good")
    completion.ids[0] += 1
    found = make_pairs.unclean("It is", completion, character_tokenizer())
    assert found == "tokenises differently"


def test_openings_are_distinct_and_held_out_ones_share_no_template(make_pairs):
    training, held_out = make_pairs.training_openings(), make_pairs.held_out_openings()
    assert len(set(training)) == len(training) == 576
    assert len(set(held_out)) == len(held_out) == 96
    assert not set(training) & set(held_out)
    assert all(4 <= len(opening.split()) <= 18 for opening in training + held_out)
