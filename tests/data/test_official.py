"""The CSV of SePO's released code, written here as that code writes it, is read as it meant it."""

import numpy as np
import pytest
from tokenizers_for_tests import chatml_tokenizer, llama2_tokenizer, plain_tokenizer

from sepo.data.read.formats import Drop, Why, find_format, read_row
from sepo.data.read.read import read_pairs
from sepo.data.read.sepo_csv import COLUMNS
from sepo.data.segments import make_segments
from sepo.data.selection import Selection, select_positions
from sepo.errors import InputError

datasets = pytest.importorskip("datasets")
pd = pytest.importorskip("pandas")  # which datasets brings
TEXTS = [
    (
        "Tell me",
        "The river is wide, and so, he added, is the wider world.",
        "He said that it is the answer.",
    ),
    (" Which\nriver?", "é😀 there, hello again.", "The name of the river is not known."),
    # a file with backslashes, quotes and line breaks is escaped in a way that its readers keep
    ('a "C:\\new" path', 'It is "\\frac{1}{2}", a\\\\b,\nand the rest.', "The C:\\ of the answer."),
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def released(tokenizer, texts=TEXTS, *, k=0.5, longest=10_000, seed=0):
    """The rows as the released code makes them, and a score for each token of each response."""
    rng, rows, scores = np.random.default_rng(seed), [], []
    for prompt, *responses in texts:
        row, of_row = {"prompt": prompt}, {}
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        start = len(tokenizer(text)["input_ids"])
        for side, response in zip(("chosen", "rejected"), responses, strict=True):
            row[f"{side}_response"] = response + tokenizer.eos_token
            ids = tokenizer(text + row[f"{side}_response"])["input_ids"][:longest]
            ids = [*ids[start:-1], tokenizer.eos_token_id]
            score = of_row[side] = rng.normal(size=len(ids)).astype("f4")  # of each token
            best = np.argsort(-score[1:])  # the first is left out, so all are named one too low
            count = int(k * len(best))
            for name, where in (("selected", best[:count]), ("unselected", best[::-1][:count])):
                row[f"{side}_{name}_args"] = ",".join(map(str, where))
                row[f"{side}_{name}_ids"] = ",".join(str(ids[p]) for p in where)
            row[f"{side}_responses_ids"] = ",".join(map(str, ids))
        rows.append(row)
        scores.append(of_row)
    return rows, scores


def write(path, rows):
    pd.DataFrame(rows).to_csv(path, index=False, escapechar="\\")
    return path


@pytest.mark.parametrize("whole", [True, False], ids=["all ids", "selected ids alone"])
@pytest.mark.parametrize("make", [chatml_tokenizer, llama2_tokenizer])
def test_the_selected_tokens_are_the_scored_ones(tmp_path, make, whole):
    tokenizer = make()
    rows, scores = released(tokenizer)
    if not whole:
        rows = [{k: v for k, v in row.items() if not k.endswith("responses_ids")} for row in rows]
    data = read_pairs(write(tmp_path / "top_0.5.csv", rows), tokenizer)
    assert data.report.format == "SePO's released code" and len(data) == 3
    for pair, score, (prompt, *responses) in zip(data.pairs, scores, TEXTS, strict=True):
        _, *segments = make_segments(pair, Selection("selected"))
        for segment, side, best, text in zip(
            segments, score, ("highest", "lowest"), responses, strict=True
        ):
            # the switch and the file select the same
            how = dict(first_token="released")
            assert segment.positions.tolist() == (
                select_positions(score[side], 0.5, best, **how).tolist()
            )
            assert {*segment.weights} == {1.0}
            whole_text = tokenizer.decode([*pair.prompt, *getattr(pair, side)])
            assert whole_text.endswith(text + tokenizer.eos_token)
            assert prompt.strip() in whole_text


def test_brackets_and_lists_are_lists_too():
    (row, *_), _ = released(chatml_tokenizer())
    form = find_format(list(row))
    plain = read_row(row, 0, form)
    brackets = {k: f"[{v}]" if k.endswith(("args", "ids")) else v for k, v in row.items()}
    lists = {
        k: [int(i) for i in v.split(",")] if k.endswith(("args", "ids")) else v
        for k, v in row.items()
    }
    for other in (read_row(brackets, 0, form), read_row(lists, 0, form)):
        for a, b in zip(plain.selected, other.selected, strict=True):
            assert all(
                (getattr(a, n) == getattr(b, n)).all() for n in ("before", "ids", "response")
            )


def test_a_response_cut_by_the_released_code_does_not_select_the_end_token_it_put_in(tmp_path):
    tokenizer = llama2_tokenizer()
    for seed in range(20):
        (row, *_), _ = released(tokenizer, longest=14, seed=seed)
        count = row["chosen_responses_ids"].count(",") + 1
        args = [int(p) for p in row["chosen_selected_args"].split(",")]
        if count - 2 in args:
            break
    (pair,) = read_pairs(write(tmp_path / "cut.csv", [row]), tokenizer).pairs
    assert len(pair.chosen) > count  # the text goes on
    assert np.flatnonzero(pair.chosen_weight).tolist() == sorted(
        {p + 1 for p in args} - {count - 1}
    )


@pytest.mark.parametrize("whole", [True, False])
def test_another_tokenizer_is_one_line_with_row_expected_and_got(tmp_path, whole):
    rows, _ = released(llama2_tokenizer())
    if not whole:
        rows = [{k: v for k, v in row.items() if not k.endswith("responses_ids")} for row in rows]
    path = write(tmp_path / "rows.csv", rows)
    with pytest.raises(InputError) as error:
        read_pairs(path, chatml_tokenizer())
    message = str(error.value)
    assert "3 its token ids are those of another tokenizer" in message and "\n" not in message
    first = int(min(map(int, rows[0]["chosen_selected_args"].split(",")))) if not whole else 0
    assert f"[pair 0, chosen token {first}: expected " in message and ", got " in message


def test_one_wrong_token_drops_its_row_and_is_reported(tmp_path):
    tokenizer = chatml_tokenizer()
    rows, _ = released(tokenizer)
    at = rows[1]["rejected_unselected_args"].split(",")[2]
    ids = rows[1]["rejected_unselected_ids"].split(",")
    right, ids[2] = ids[2], "7"
    rows[1]["rejected_unselected_ids"] = ",".join(ids)
    data = read_pairs(write(tmp_path / "rows.csv", rows), tokenizer)
    assert [pair.id for pair in data.pairs] == ["0", "2"]
    assert data.report.dropped == {Why.OTHER_IDS: 1}
    assert f"[pair 1, rejected token {at}: expected 7, got {right}]" in str(data.report)


def test_a_response_that_shares_a_token_with_the_prompt_is_dropped(tmp_path):
    """The released code counts from the length of the prompt's own tokens, which it then misses."""
    tokenizer = chatml_tokenizer()
    rows, _ = released(
        tokenizer, [*TEXTS, ("Tell me", "Hello there, hello again.", "He said that it is.")]
    )
    report = read_pairs(write(tmp_path / "rows.csv", rows), tokenizer).report
    assert report.kept == 3 and report.dropped == {Why.OTHER_IDS: 1}


def test_a_position_beyond_the_text():
    (row, *_), _ = released(chatml_tokenizer())
    row = {k: v for k, v in row.items() if not k.endswith("responses_ids")}
    row |= {"chosen_selected_args": "500", "chosen_selected_ids": "9"}
    data = datasets.Dataset.from_list([row])
    with pytest.raises(InputError, match=r"\[pair 0, chosen token 500: expected 9, got the end\]"):
        read_pairs(data, chatml_tokenizer())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"chosen_selected_args": "", "chosen_selected_ids": ""}, Why.ZERO_WEIGHT),
        ({"prompt": " "}, Why.NO_PROMPT),
        ({"rejected_response": None}, Why.EMPTY),
    ],
)
def test_drop(change, why):
    (row, *_), _ = released(chatml_tokenizer())
    dropped = read_row(row | change, 0, find_format(list(row)))
    assert isinstance(dropped, Drop) and dropped.why is why


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen_selected_args": "1,2"}, "chosen_selected_ids to hold 2 numbers, .* got [1-9]"),
        ({"chosen_selected_args": "1,x"}, "chosen_selected_args to be JSON, got"),
        ({"rejected_unselected_args": "-1"}, "rejected_unselected_args to be token ids, got -1"),
        (
            {"chosen_selected_args": "999", "chosen_selected_ids": "1"},
            "chosen_selected_args below .* the end of chosen_responses_ids, got 999",
        ),
    ],
)
def test_cells_that_do_not_fit_name_row_and_column(change, message):
    (row, *_), _ = released(chatml_tokenizer())
    with pytest.raises(InputError, match=f"pair 0: expected {message}"):
        read_row(row | change, 0, find_format(list(row)))


def test_a_chat_template_is_needed():
    rows, _ = released(chatml_tokenizer())
    data = datasets.Dataset.from_list(rows)
    with pytest.raises(InputError, match="pair 0: expected a tokenizer with a chat template"):
        read_pairs(data, plain_tokenizer())


def test_the_columns_are_those_of_the_released_code():
    (row, *_), _ = released(chatml_tokenizer())
    assert set(COLUMNS) < set(row)
