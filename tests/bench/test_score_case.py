"""A pass of the scorer: what it is timed on, and its share of the roof."""

import torch
from bench_jobs import finished

from bench import jobs
from bench.harness import Job
from bench.operations import score
from bench.steps import models

TINY = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=61, max_position_embeddings=64, tie_word_embeddings=True,
)  # fmt: skip


def test_a_pass_of_drawn_pairs(monkeypatch):
    monkeypatch.setitem(models.SHAPES, "tiny", TINY)
    monkeypatch.setattr(score, "why_slow", lambda *about: "no instructions")
    case = score.ScoreCase("tiny", "tiny", 3, max_length=24)
    exact, *halves = finished(Job(case, score.SCORE, device="cpu", rounds=2))
    inputs = case.inputs("cpu")
    tokens = sum(len(p) for p in inputs.pairs)
    assert exact.status == "measured" and len(exact.seconds) == 2
    assert exact.note == f"{tokens} tokens of 3 pairs" and exact.rate.endswith(" tokens/s")
    assert all(h.status != "measured" and "no instructions" in h.reason for h in halves)
    # two FLOP a weight of the layers and a token, and of the head and a response's token
    rows = sum(len(p.chosen) + len(p.rejected) for p in inputs.pairs)
    layers = sum(p.numel() for p in inputs.model.model.layers.parameters() if p.ndim == 2)
    products = 2 * (layers * tokens + 61 * 32 * rows)
    assert products < exact.flop < 1.3 * products  # the rest: attention
    assert exact.roof > 0


def test_a_model_of_two_products(monkeypatch):
    monkeypatch.setitem(models.SHAPES, "tiny", TINY)
    inputs = score.ScoreCase("tiny", "tiny", 3, max_length=24).inputs("cpu")
    two, three = inputs.halves_of_two, inputs.halves
    assert two.of_two == two.layers == three.layers and three.of_two == 0


def test_the_suite_has_a_case_on_each_device():
    names = lambda device: [job.name for job in jobs.jobs(("score",), device=device)]
    assert names("cpu") == ["score-smollm2"] and names("cuda") == ["score-llama-1b"]
    assert score.cases("cuda")[0].dtype == torch.float32
