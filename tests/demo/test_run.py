"""Every stage of the demo on a tiny model: the real path, in seconds."""

import json

import numpy as np
import pytest
from characters import character_tokenizer
from tiny import tiny_model

from sepo.commands import demo
from sepo.data import ScoredPair
from sepo.data.segments import make_segments
from sepo.data.selection import Selection
from sepo.demo import report, run
from sepo.demo.lexicon import in_lexicon, selection_lift
from sepo.errors import InputError
from sepo.flags.parser import Parser


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    def save(place):
        tiny_model().save_pretrained(place)
        character_tokenizer().save_pretrained(place)
        return place

    monkeypatch.setattr(run, "save_smollm2", save)
    for settings in (run.ORACLE, run.POLICY):  # more than the one step of warm-up
        monkeypatch.setitem(settings, "pairs_per_step", 2)
    data = tmp_path / "data"
    data.mkdir()
    row = dict(prompt="The film was", chosen=" good and nice", rejected=" bad, a sad waste")
    for name, count in (("pairs", 6), ("heldout", 2)):
        rows = [json.dumps(dict(row, id=f"{name}-{i}")) + "\n" for i in range(count)]
        (data / f"{name}.jsonl").write_text("".join(rows))
    (data / "heldout_openings.txt").write_text("The plot\nHer voice\n")
    parser = Parser()
    demo.add_arguments(parser)
    return parser.parse_args(
        ["--output_dir", str(tmp_path / "out"), "--data", str(data), "--oracle_pairs", "4",
         "--per_opening", "2"]
    )  # fmt: skip


def test_all_stages_twice(arguments, capsys):
    for _ in range(2):
        demo.run(arguments)
    out = capsys.readouterr().out
    assert out.startswith("about ") and " on this machine (" in out.splitlines()[0]
    summary = json.loads((arguments.output_dir / "summary.json").read_text())
    assert summary["pairs"] == {"train": 6, "heldout": 2}
    assert {"lexicon_rate_selected", "lexicon_rate_all", "lift", "lift_random"} == set(
        summary["selection"]
    )
    tokens = summary["tokens"]
    assert tokens["packed_truncated"] <= tokens["packed"] < tokens["padded_unshared"]
    # 14 and 17 characters of response: floor of 30 % of each
    assert summary["rows"] == {"response": 6 * 31, "selected": 6 * (4 + 5)}
    assert set(summary["policy"]) == {"reference", "sepo", "sepo_rand"}
    assert set(summary["policy"]["sepo"]) == {"reward", "reward_ci95", "accuracy", "kl_per_token"}
    assert summary["policy"]["sepo"]["kl_per_token"] > 0
    assert set(summary["stages"]) >= {"model", "oracle", "score", "sepo", "sepo_rand", "evaluate"}
    assert "SePO's sentiment" in out and "lift" in out


def test_a_directory_of_somebody_else_is_left_alone(arguments):
    arguments.output_dir.mkdir()
    (arguments.output_dir / "thesis.tex").touch()
    with pytest.raises(InputError, match="not empty and not made by the demo"):
        demo.run(arguments)
    assert [p.name for p in arguments.output_dir.iterdir()] == ["thesis.tex"]


def test_missing_data_is_named_before_anything_is_made(arguments, tmp_path):
    arguments.data = tmp_path / "nowhere"
    with pytest.raises(InputError, match="nowhere/heldout_openings.txt"):
        demo.run(arguments)
    assert not arguments.output_dir.exists()


def test_tokens_of_lexicon_words():
    ids = np.array(character_tokenizer()(" a sad, bad ox")["input_ids"])
    flags = in_lexicon(ids, character_tokenizer())
    assert "".join("x" if f else "." for f in flags) == "...xxx..xxx..."


def test_lift_by_hand():
    encode = lambda text: np.array(character_tokenizer()(text)["input_ids"], np.int32)
    chosen, rejected = encode("ox sad"), encode("bad ox")  # 3 of 6 characters each
    pair = ScoredPair(
        id="0",
        prompt=encode("A"),
        chosen=chosen,
        rejected=rejected,
        chosen_score=np.array([0, 0, 0, 5, 4, 3], "f4"),  # highest three: s, a, d
        rejected_score=np.array([-5, -4, 0, -3, 0, 0], "f4"),  # lowest three: b, a and the blank
    )
    selected, everything = (
        [make_segments(pair, Selection(how, fraction=0.5))] for how in ("selected", "all")
    )
    assert selection_lift([pair], selected, everything, character_tokenizer()) == {
        "lexicon_rate_selected": round(5 / 6, 4),
        "lexicon_rate_all": 0.5,
        "lift": 1.667,
        "lift_random": 1.0,
    }


@pytest.mark.parametrize(
    ("interval", "words"),
    [([0.5, 0.6], "above"), ([0.1, 0.2], "below"), ([0.35, 0.5], "cannot be told")],
)
def test_the_verdict_is_what_the_intervals_say(interval, words):
    policy = {"reference": {"reward_ci95": [0.3, 0.4]}, "sepo": {"reward_ci95": interval}}
    assert words in report.verdict(policy)
