"""The weak-to-strong examples: the cut model, stages that survive a kill, and what they report."""

import json
import re

import numpy as np
import pytest
import torch
from tiny import tiny_model

from sepo.errors import InputError


@pytest.fixture(autouse=True)
def scripts(monkeypatch, pytestconfig):
    for name in ("sentiment", "weak_to_strong"):
        monkeypatch.syspath_prepend(pytestconfig.rootpath / "examples" / name)


@pytest.mark.parametrize("arch", ["llama", "gpt_neox", "qwen3"])
def test_a_cut_model_is_the_first_layers(arch, tmp_path):
    from cut_layers import cut_layers
    from transformers import AutoModelForCausalLM

    model = tiny_model(arch, num_hidden_layers=3).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    last = []
    cut_layers(model, 2).save_pretrained(tmp_path)
    cut = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    cut.get_decoder().layers[-1].register_forward_hook(
        lambda _, __, out: last.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        cut(ids)
    assert len(cut.get_decoder().layers) == cut.config.num_hidden_layers == 2
    torch.testing.assert_close(last[0], states[2])


@pytest.mark.parametrize("count", [0, 2, 5])
def test_a_cut_that_cuts_nothing_is_refused(count):
    from cut_layers import cut_layers

    with pytest.raises(InputError, match=f"from 1 to 1, got {count}"):
        cut_layers(tiny_model(), count)


@pytest.fixture
def stages(tmp_path):
    from stages import Stages

    return Stages(tmp_path, tmp_path / "model")


def test_a_stage_is_made_once_and_whole(stages):
    calls = []

    def write(out, fail=False):
        calls.append(sorted(p.name for p in out.iterdir()) if out.exists() else None)
        out.mkdir(exist_ok=True)
        (out / f"part-{len(calls)}").touch()
        if fail:
            raise KeyboardInterrupt

    for name, kept in (("train", None), ("score", ["part-1"])):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            stages.make(name, lambda out: write(out, fail=True), resumable=name == "score")
        assert not (stages.place / name).exists()
        for _ in range(2):
            assert stages.make(name, write, resumable=name == "score") == stages.place / name
        assert calls == [None, kept]


def test_the_halves_share_no_template(stages):
    from openings import TRAINING

    known = [re.compile(re.escape(t).replace(r"\{film\}", ".+")) for t in TRAINING]
    sides = [
        [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
        for path in stages.halves()
    ]
    a, b = (
        {number for prompt in side for number, t in enumerate(known) if t.fullmatch(prompt)}
        for side in sides
    )
    assert not a & b and len(a | b) > 40  # of 48: a template may have no pair
    assert sum(map(len, sides)) == 412 and min(map(len, sides)) > 180


def test_lift_and_overlap_of_a_case_done_by_hand():
    from stages import jaccard, lift

    flags = lambda *words: np.array(words, bool)
    # 4 of 10 tokens are of the lexicon; 3 of the 4 selected are
    known = [[flags(1, 0, 0), flags(0, 1)], [flags(1, 1, 0), flags(0, 0)]]
    selected = [[np.array([0]), np.array([1])], [np.array([1]), np.array([0])]]
    value, low, high = lift(known, selected)
    assert value == pytest.approx(0.75 / 0.4) and low <= value <= high
    other = [[np.array([0]), np.array([1])], [np.array([0, 1]), np.array([1])]]
    assert jaccard(selected, other)[0] == pytest.approx((1 + 1 + 1 / 2 + 0) / 4)
    assert jaccard(selected, selected) == [1, 1, 1]


def test_policies_are_compared_opening_by_opening():
    from stages import compare_policies

    one, other = np.array([0.1, 0.9, -0.5]), np.array([0.0, 0.8, -0.6])
    rows = compare_policies(
        {"a": {"reward_by_opening": one.tolist()}, "b": {"reward_by_opening": other.tolist()}},
        ["a"],
    )
    assert rows["b"]["reward_minus_a"] == pytest.approx([-0.1, -0.1, -0.1])
    low, high = rows["b"]["reward"][1:]
    assert high - low > 1  # of each alone: the openings differ more than the policies
