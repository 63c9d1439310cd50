"""The race against TRL: the same answer as TRL's trainers, and no speed for a wrong one."""

import json
import warnings
from importlib.metadata import version

import numpy as np
import pytest
import torch
from bench_jobs import COUNTED, finished, stepping
from scoring_for_tests import make_tokenizer
from tiny import V, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from bench.contender import Contender, missing
from bench.harness import Job, Row, check
from bench.run import main
from bench.steps import models, ours, savings, table, trl, work
from bench.steps import pairs as rows
from bench.steps.case import StepCase, be_quiet
from bench.steps.inputs import FLOAT32, Steps
from bench.steps.models import Weights

TRL = pytest.mark.skipif(missing("trl") is not None, reason="trl is not installed")
be_quiet()


@pytest.fixture(autouse=True)
def warnings_of_peers_are_theirs():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def weights() -> Weights:
    return Weights(tiny_model())


def dealt(weights: Weights, *, rounds: int = 1, per_round: int = 3) -> list[list]:
    """Pairs with scores and the reference's log-probabilities; round 0 is the gate's."""
    pairs = [rows.with_scores(p) for p in rows.drawn_pairs(rounds * per_round, V, 48)]
    return ours_cached(weights, rows.deal(pairs, rounds, per_round))


def ours_cached(weights: Weights, rounds: list[list]) -> list[list]:
    return [ours.reference_logp(weights, pairs)[0] for pairs in rounds]


def everybody(weights: Weights, rounds: list[list]) -> list[Contender]:
    return [
        *trl.contenders(weights, rounds, None, bf16=False, max_length=48),
        *ours.contenders(weights, rounds, bf16=False),
        *savings.contenders(weights, rounds, bf16=False),
    ]


@TRL
def test_everybody_has_the_same_loss_and_gradient(weights):
    """One step of TRL's trainers, ours, and of each saving, against one response a row."""
    rounds = dealt(weights)
    inputs = Steps(everybody(weights, rounds), weights, rounds, savings.truth)
    assert abs(inputs.truth("dpo").loss - np.log(2)) > 0.01, "the reference is the policy"
    for contender in sorted(inputs.contenders, key=lambda contender: contender.objective):
        reason, errors = check(contender, inputs, FLOAT32)
        assert reason == "", contender.name
        assert errors["cosine"] > 0.999999, contender.name
        # lowering gives it to accelerate, as Trainer would: in float32 nothing may change
        contender.lower()
        _, again = check(contender, inputs, FLOAT32)
        assert again == errors, contender.name


def spoilt(step, spoil):
    def wrong(number):
        value = step(number)
        spoil()
        return value

    return wrong


WRONG = {
    "gradient": lambda w: w.parameters[3].grad.mul_(1.1),
    "nan": lambda w: w.parameters[0].grad[0].fill_(torch.nan),
    "missing": lambda w: setattr(w.parameters[-1], "grad", None),
    "twice": lambda w: [p.grad.mul_(2) for p in w.parameters],
    "crash": lambda w: 1 / 0,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_only_what_is_right_has_a_speed(weights, dtype):
    rounds = dealt(weights, rounds=2)
    (right,) = [
        c
        for c in savings.contenders(weights, rounds, bf16=False, turns=1)
        if c.name == "simpo: fused"
    ]
    others = [
        Contender(
            name, spoilt(right.run, lambda spoil=spoil: spoil(weights)), objective="simpo",
            group="sepo", work=right.work,
        )
        for name, spoil in WRONG.items()
    ]  # fmt: skip
    others.append(Contender("absent", None, lambda inputs: "not installed", objective="simpo"))
    others.append(Contender("other loss", right.run, objective="sepo", work=right.work))
    racing = stepping([right, *others], weights, rounds, savings.truth, dtype)
    found = {row.contender: row for row in finished(racing)}
    fine = found.pop("simpo: fused")
    assert fine.status == "measured" and len(fine.seconds) == 1 and fine.median > 0
    assert fine.peak_bytes > 0 and fine.total_bytes > weights.static_bytes
    assert found.pop("absent").status == "skipped"
    assert {row.status for row in found.values()} == {"refused"}
    assert not any(row.seconds for row in found.values())
    assert "gradient is off by" in found["twice"].reason and "loss" not in found["twice"].reason
    assert found["crash"].reason == "ZeroDivisionError: division by zero"
    text = table.table([fine, *found.values()])
    assert "refused: gradient is off by nan" in text


def test_an_attention_that_cannot_run_is_named(weights):
    rounds = dealt(weights)
    found = ours.contenders(weights, rounds, bf16=False, attn_impls=("sdpa", "varlen"))
    job = stepping(found, weights, rounds, savings.truth)
    rows = {row.provider: row for row in finished(job)}
    assert rows["simpo (sdpa)"].status == "measured"
    assert rows["simpo (varlen)"].status == "skipped" and rows["simpo (varlen)"].reason
    assert "skipped: " + rows["simpo (varlen)"].reason in table.table(list(rows.values()))


def test_a_step_ends_with_adamw_on_weights_that_all_share(weights):
    twin = weights.twin()
    assert all(a is b for a, b in zip(twin.parameters(), weights.parameters, strict=True))
    rounds = dealt(weights)
    before = [p.detach().clone() for p in weights.parameters]
    sepo = next(c for c in ours.contenders(weights, rounds, bf16=False) if c.objective == "sepo")
    sepo.run(0)
    weights.finish()
    assert all(not torch.equal(a, b) for a, b in zip(before, weights.parameters, strict=True))
    assert all(p.grad is None for p in weights.parameters)


def test_what_each_saving_reads(weights):
    """A pair of known lengths: prompt 5, chosen 7, rejected 4, and another of 3, 2, 6."""
    draw = np.random.default_rng(0)
    tokens = lambda n: draw.integers(0, V, n).astype(np.int32)
    pairs = [
        rows.with_scores(rows.TokenPair(id=str(i), prompt=tokens(p), chosen=tokens(c), rejected=tokens(r)))
        for i, (p, c, r) in enumerate([(5, 7, 4), (3, 2, 6)])
    ]  # fmt: skip
    found = savings.contenders(weights, [pairs], bf16=False, objectives=("simpo",))
    asked = {c.name.removeprefix("simpo: "): c.work(0) for c in found}
    seen = {name: (w.tokens, w.rows) for name, w in asked.items()}
    padded = 4 * 12
    assert seen == {
        "unpacked": (padded, padded),
        "packed": (12 + 9 + 5 + 9, 35),
        "shared": (16 + 11, 27),
        "truncated": (27 - 4, 23),  # a response's last token is a target only
        "selected": (23, 19),
        "fused": (23, 19),
    }
    flops = {name: w.flops for name, w in asked.items()}
    assert flops["unpacked"] == flops["packed"] > flops["shared"]
    assert flops["shared"] > flops["truncated"] == flops["fused"]


@COUNTED
def test_model_flops_are_what_torch_counts(weights):
    """A pass over unpadded rows without a cache: nothing is computed that the model does not need."""
    model = weights.twin()
    model.set_attn_implementation("eager")
    ids = torch.zeros(1, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    # the counter takes all of attention's square, the formula its causal half: (16 * 17 / 2) / 256
    found = work.training(model, [(10, 6, 0)], 16)
    config = model.config
    square = 3 * 4 * config.num_hidden_layers * config.hidden_size * 16 * (16 - 1) // 2
    assert found + square == counter.get_total_flops()


def test_texts_joined_to_the_lengths_of_chats(tmp_path):
    """The same file every time, and the rows that TRL reads are those that we tokenise."""
    first, again = (rows.joined_texts(tmp_path / name) for name in ("a.jsonl", "b.jsonl"))
    assert first.read_bytes() == again.read_bytes()
    texts = rows.texts(first)
    counts = np.array(
        [[len(t[k].split()) for k in ("prompt", "chosen", "rejected")] for t in texts]
    )
    np.testing.assert_allclose(np.median(counts, 0), rows.WORDS_A_TOKEN * rows.MEDIANS, rtol=0.15)
    assert len({t["id"] for t in texts}) == len(texts) == 300
    ids = [pair.id for pair in rows.taken(first, make_tokenizer(), V, 512, 0)[0]]
    assert set(ids) <= {t["id"] for t in texts} and len(ids) > 200


def test_rounds_use_every_pair_before_one_again():
    pairs = rows.drawn_pairs(10, V, 64)
    gate_pairs, *timed = rows.deal(pairs, 5, 4)
    assert len(gate_pairs) == 2 and [len(r) for r in timed] == [4] * 5
    ids = [int(pair.id) for pairs in timed for pair in pairs]
    assert sorted(ids[:10]) == sorted(ids[10:]) == list(range(10)) and ids[:10] != list(range(10))
    assert all(len(p.prompt) + max(len(p.chosen), len(p.rejected)) <= 64 for p in pairs)


def test_bars():
    row = lambda name, seconds, peak: Row(
        "step", "", name, "measured", contender=name, seconds=seconds, peak_bytes=peak
    )
    text = table.bars([row("TRL DPO", [6.0, 13.0], 30), row("sepo 30 %", [1.0, 2.0], 12)])
    assert text == (
        "sepo 30 % is 6.25 x as fast as TRL DPO: reaches 6\n"
        "sepo 30 % needs 1/2.50 of the memory of TRL DPO: misses 3"
    )
    assert table.bars([]) == ""
    slow, quick = (
        Row("step", "", f"simpo ({a})", "measured", contender="simpo", median=t)
        for a, t in (("flex", 2.0), ("varlen", 1.0))
    )
    assert table.quickest([slow, quick], "simpo").provider == "simpo (varlen)"


def tiny_shape(monkeypatch):
    shape = dict(tiny_model().config.to_dict(), vocab_size=V, initializer_range=0.2)
    keys = models.SHAPES["smollm2-shape"].keys()
    monkeypatch.setitem(models.SHAPES, "tiny", {k: shape[k] for k in keys if k in shape})


def test_the_whole_program(tmp_path, monkeypatch, capsys):
    tiny_shape(monkeypatch)
    path = tmp_path / "rows.jsonl"
    arguments = (
        "--case step --model tiny --pairs 2 --rounds 2 --max_length 48 --float32 --device cpu"
    )
    files = "--json", str(path), "--figure", str(tmp_path / "figure.svg")
    assert main([*arguments.split(), "--providers", "sepo", *files]) == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["contender"] for line in lines] == [
        *ours.NAMES.values(),
        "sepo 30 %, cheap again",
        "sepo 30 %, checkpointing",
    ]
    assert {line["status"] for line in lines} == {"measured"}
    assert {len(line["seconds"]) for line in lines} == {2}
    assert all(line["suite"] == line["case"] == "step" and line["ours"] for line in lines)
    assert all(line["flop"] > 0 and line["roof"] > 0 and line["commit"] for line in lines)
    assert all(line["versions"]["torch"] == version("torch") for line in lines)
    said = capsys.readouterr().out
    assert "weights float32, no autocast" in said and str(path) in said
    assert "gate step: 5 of 5 pass" in said and "roof: " in said
    assert "sepo 30 %, checkpointing" in (tmp_path / "figure.svg").read_text()


def test_a_step_of_some_contenders(monkeypatch):
    """Names and groups; without TRL's nothing of TRL is asked."""
    tiny_shape(monkeypatch)
    setting = dict(model="tiny", pairs=2, rounds=1, max_length=48, float32=True)
    case = lambda wanted: StepCase("step", **setting, wanted=wanted)
    names = lambda *wanted: [row.provider for row in Job(case(wanted), device="cpu").gate()]
    monkeypatch.setattr(trl, "contenders", lambda *_, **options: pytest.fail("TRL was asked"))
    assert names("simpo", "sepo: fused") == ["simpo", "sepo: fused"]
    assert len(names("savings")) == 12
