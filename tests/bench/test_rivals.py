"""The peers that a CPU can run pass the gate, in small; the others say what they need."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from bench_jobs import TINY, finished
from tiny import V, tiny_model

from bench import contenders, ledger, measure, run
from bench.contender import Contender, missing
from bench.contenders import peers
from bench.harness import Job
from bench.operations import head, high_entropy, kl, stats
from bench.steps import ours
from bench.steps import trl as steps
from bench.steps.models import Weights
from bench.steps.pairs import drawn_pairs, with_scores

HEAD = "torch_lce", "torch_lce_tokens", "torch_lce_chunked", "trl"
LCE = pytest.mark.skipif(
    not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="needs torch 2.13"
)
TRL = pytest.mark.skipif(missing("trl") is not None, reason="trl is not installed")
KL = dict(dtype=torch.float32, N=24, M=10, D=16, V=101)


@pytest.fixture(autouse=True)
def warnings_of_peers_are_theirs():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def gated(case, found) -> dict:
    return {row.provider: row for row in Job(case, found, device="cpu").gate()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [pytest.param(n, marks=TRL if n == "trl" else LCE) for n in HEAD])
def test_heads(name, dtype):
    found = [p for p in contenders.HEAD if p.name == name]
    row = gated(head.HeadCase("tiny", 0.5, dtype, **TINY), found)[name]
    assert (row.status, row.reason) == ("passed", "")
    values = {"loss"} if name == "torch_lce_chunked" else {"logp"}
    assert row.errors.keys() == values | {"grad_hidden", "grad_weight"}


@TRL
@pytest.mark.parametrize("entropy_grad", [False, True], ids=["metrics", "entropy"])
def test_statistics(entropy_grad):
    # its entropy is a difference of log-sum-exp and mean: in a small vocabulary it is refused
    size = dict(TINY, V=2048)
    case = stats.StatsCase("small", 0.5, torch.float32, entropy_grad=entropy_grad, **size)
    row = gated(case, peers.STATS)["trl"]
    assert (row.status, row.reason) == ("passed", "")
    assert row.errors.keys() == {*stats.NAMES[:-1], "grad_hidden", "grad_weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_tokens_of_high_entropy(dtype):
    """Who has them all, and masks, differentiates the same rows as who computes those alone."""
    case = high_entropy.HighEntropyCase("tiny", 1.0, dtype, **TINY)
    all_rows = lambda inputs: inputs.plain(True) | head.LogprobInputs.plain(inputs, True)
    found = gated(case, (*contenders.HIGH_ENTROPY, Contender("wrong", all_rows)))
    assert {name for name, row in found.items() if row.status == "refused"} == {"wrong"}
    passed = {name for name, row in found.items() if row.status == "passed"}
    assert passed | {"trl"} == {"gemm", "sepo", "sepo:every_row", "dense_gathered", "trl"}


def defined(direction, log_p, log_q):
    def apart(a, b):
        return torch.nn.functional.kl_div(b, a, log_target=True, reduction="none").sum(-1)

    if direction == kl.JSD:
        log_m = ((log_p.exp() + log_q.exp()) / 2).log()
        return (apart(log_p, log_m) + apart(log_q, log_m)) / 2
    return apart(log_q, log_p) if direction == "ref||policy" else apart(log_p, log_q)


@TRL
@pytest.mark.parametrize("direction", [*kl.DIRECTIONS, kl.JSD], ids=str)
def test_divergence(direction):
    """Its divergence and that's gradient; of another it has no speed."""
    case = kl.KLCase("tiny", direction, **KL)
    (right,) = peers.KL
    other = next(d for d in kl.DIRECTIONS if d != direction)

    def wrong(inputs):
        turned = SimpleNamespace(**vars(inputs) | {"case": SimpleNamespace(direction=other)})
        turned.leaves = inputs.leaves
        return right.run(turned)

    found = [right, Contender("wrong", wrong, objective="kl")]
    rows = gated(case, found)
    assert (rows["trl_divergence"].status, rows["trl_divergence"].reason) == ("passed", "")
    assert rows["trl_divergence"].errors.keys() == {"kl", "grad_hidden", "grad_weight"}
    assert rows["wrong"].status == "refused" and "grad_hidden is off by" in rows["wrong"].reason


@pytest.mark.parametrize("direction", [*kl.DIRECTIONS, kl.JSD], ids=str)
def test_truth_of_the_kl_alone_is_autograd_in_float64(direction):
    inputs = kl.KLCase("tiny", direction, **KL).inputs("cpu")
    hidden = inputs.hidden.double().requires_grad_()
    weight = inputs.weight.double().requires_grad_()
    log_p = (hidden[inputs.rows] @ weight.T).log_softmax(-1)
    log_q = (inputs.ref_hidden[inputs.rows].double() @ inputs.ref_weight.double().T).log_softmax(-1)
    divergence = defined(direction, log_p, log_q)
    (divergence @ inputs.upstream_kl.double()).backward()
    true = {"kl": divergence.detach(), "grad_hidden": hidden.grad, "grad_weight": weight.grad}
    assert max(inputs.errors(true, "kl").values()) < 1e-12


def test_what_needs_a_gpu_says_so():
    names = "liger", "liger_hopper", "quack"
    found = [p for p in contenders.HEAD if p.name in names]
    rows = gated(head.HeadCase("tiny", 0.5, torch.float32, **TINY), found)
    assert tuple(rows) == names and {row.status for row in rows.values()} == {"skipped"}
    assert all("GPU" in row.reason for row in rows.values())


def test_every_large_case_has_its_rivals():
    heads = {p.name for p in contenders.HEAD}
    named = "trl", "liger", "liger_hopper", "torch_lce_tokens", "cce", "quack"
    for case in head.cases("cuda"):
        job = Job(case, contenders.HEAD, device="cuda")
        assert heads >= {*named} and {p.name for p in job.contenders} >= {*named}
    for case in kl.cases("cuda"):
        job = Job(case, contenders.KL, device="cuda")
        assert "trl_divergence" in {p.name for p in job.contenders}


@TRL
def test_liger_layers_are_in_the_policy_and_in_a_live_reference(monkeypatch):
    asked, weights = [], Weights(tiny_model())
    monkeypatch.setattr(steps, "use_liger", asked.append)
    monkeypatch.setattr(steps, "missing", lambda package: None)
    pairs = [with_scores(pair) for pair in drawn_pairs(2, V, 48)]
    rounds = [ours.reference_logp(weights, pairs)[0]]
    policy, reference = weights.model.lm_head.weight, weights.reference.lm_head.weight
    for variant in steps.VARIANTS:
        found = steps._try(variant, weights, rounds, steps.letters(), bf16=False, max_length=48)
        assert found.run is not None, found.why_not(None)
        expected = [policy, reference] if variant.objective == "dpo" else [policy]
        layers = [model.lm_head.weight for model in asked]
        assert all(a is b for a, b in zip(layers, expected * variant.liger, strict=True))
        asked.clear()


def failing_after(calls: int):
    """A provider that is right so many times, and then out of memory."""
    done = []

    def run(inputs):
        done.append(1)
        if len(done) > calls:
            raise torch.OutOfMemoryError("out of memory\nof which this much is free")
        hidden, weight = inputs.leaves()
        logp = (hidden[inputs.rows] @ weight.T).log_softmax(-1)
        logp = logp.gather(-1, inputs.targets[:, None])[:, 0]
        grads = torch.autograd.grad(logp, (hidden, weight), inputs.upstream)
        return dict(
            zip(("logp", "grad_hidden", "grad_weight"), (logp.detach(), *grads), strict=True)
        )

    return run


@pytest.mark.parametrize("calls", [0, 1, 3])  # in the gate, before the rounds, in them
@pytest.mark.parametrize("ours", [False, True])
def test_a_failure_is_its_owners_alone(calls, ours):
    found = [
        Contender("sepo", failing_after(99), ours=True),
        Contender("fails", failing_after(calls), ours=ours),
    ]
    job = Job(head.HeadCase("tiny", 0.5, torch.float32, **TINY), found, device="cpu", rounds=2)
    rows, code = run.run([job], tell=lambda text: None)
    assert code == int(ours)
    state = {row["provider"]: (row["status"], row["reason"]) for row in rows}
    assert state["fails"] == ("refused", "OutOfMemoryError: out of memory")
    measured = "measured" if calls or not ours else "passed"  # a red gate times nothing
    assert state["sepo"] == (measured, "")


def test_a_broken_device_ends_the_process(monkeypatch, capsys):
    def wait():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    with pytest.raises(SystemExit) as ended:
        measure.recover("cuda")
    assert ended.value.code == ledger.BROKEN
    assert capsys.readouterr().out == (
        "the device is broken: RuntimeError: CUDA error: an illegal memory access was encountered\n"
    )


@TRL
def test_a_finished_race_of_the_divergence():
    (right,) = peers.KL
    job = Job(kl.KLCase("tiny", "ref||policy", **KL), [right], device="cpu", rounds=1)
    assert [row.status for row in finished(job)] == ["measured"]
