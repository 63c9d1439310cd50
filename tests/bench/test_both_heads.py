"""bench/drop_in.py: TRL's trainers run on both heads, and what they differ in is printed."""

import re

import pytest
from tiny import tiny_model, tiny_tokenizer

from bench import drop_in

pytest.importorskip("trl")
pytest.importorskip("datasets")
from trl_runs import PAIRS  # noqa: E402


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setattr(drop_in, "default_source", lambda: None)
    monkeypatch.setattr(drop_in, "texts", lambda source: PAIRS)
    monkeypatch.setattr(drop_in.models, "TRAINERS", str(tmp_path / "trainers"))
    tiny_model(max_position_embeddings=256).save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_both_heads_beside_each_other(model, capsys):
    sizes = ["--pairs", "2", "--max_length", "64", "--completion", "8", "--rounds", "1"]
    drop_in.main(["--model", model, "--steps", "2", "--grpo_steps", "1", *sizes])
    first, dpo, grpo = capsys.readouterr().out.split(" steps of ")
    assert "DPO, 2" in first and "GRPO, 1" in dpo
    for table, names in (
        (dpo, {"loss", "rewards/margins", "logits/chosen", "mean_token_accuracy"}),
        (grpo, {"loss", "reward", "entropy"}),
    ):
        number = r"(-?[\d.]+(?:e[+-]\d+)?)"
        rows = re.findall(rf"\| ([\w/]+) \| {number} \| {number} \| {number} \|", table)
        assert names <= {name for name, *_ in rows}
        # a reward is a difference of sums over responses, and as far off as they are
        size = max(1, *(abs(float(value)) for _, value, *_ in rows))
        assert all(float(apart) <= 1e-6 * size for *_, apart in rows), rows
        assert re.search(r"MiB at the peak \| \d+ \| \d+ \|", table)


def test_one_kind_alone(model, capsys):
    sizes = ["--pairs", "2", "--completion", "4", "--rounds", "1"]
    drop_in.main(["--model", model, "--steps", "0", *sizes])
    printed = capsys.readouterr().out
    assert "GRPO, 1" in printed and "DPO" not in printed


def test_the_reward_is_of_texts_and_of_messages():
    answer = "a b a"
    for completion in (answer, [{"role": "assistant", "content": answer}]):
        assert drop_in.different_words([completion]) == [2 / 3]
