"""The benchmark's gate: a wrong provider has no speed, a missing one has a reason."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from bench_jobs import ATTENTION, TINY, finished, logprob

from bench import jobs, measure, precision, report
from bench.contender import Contender
from bench.harness import Job
from bench.operations import attention, head, kl, topk


def run_case(case, providers, *, rounds):
    return finished(Job(case, providers, device="cpu", rounds=rounds))


def fail(inputs):
    raise RuntimeError("no compiler")


WRONG = {
    "value": lambda found: found | {"logp": found["logp"] + 0.11},
    "gradient": lambda found: found | {"grad_weight": found["grad_weight"] * 1.2},
    "nan": lambda found: found | {"grad_hidden": found["grad_hidden"] * float("nan")},
    "one nan": lambda found: found | {"logp": found["logp"].index_fill(0, torch.tensor(0), torch.nan)},
    "shape": lambda found: found | {"logp": found["logp"][1:]},
    "no gradient": lambda found: {"logp": found["logp"]},
    "in float32 only": lambda found: found | {"logp": found["logp"] + 2e-3},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_only_what_is_right_has_a_speed(dtype):
    providers = [Contender("right", logprob), Contender("crash", fail)]
    providers += [
        Contender(name, lambda inputs, spoil=spoil: logprob(inputs, spoil))
        for name, spoil in WRONG.items()
    ]
    providers.append(Contender("missing", fail, lambda inputs: "peer is not installed"))
    case = head.HeadCase("tiny", 0.5, dtype, **TINY)
    rows = {row.provider: row for row in run_case(case, providers, rounds=3)}

    fine = {"right", "in float32 only"} if dtype == torch.bfloat16 else {"right"}
    assert {name for name, row in rows.items() if row.status == "measured"} == fine
    for name, row in rows.items():
        assert len(row.seconds) == (3 if name in fine else 0)
        assert (row.median > 0) == (name in fine)
    assert rows["missing"].status == "skipped"
    assert rows["missing"].reason == "peer is not installed"
    assert rows["crash"].reason == "RuntimeError: no compiler"
    assert "logp is off by" in rows["value"].reason
    assert rows["no gradient"].reason == "gives no grad_hidden, grad_weight"
    text = report.table(list(rows.values()))
    assert "skipped: peer is not installed" in text
    assert "refused: grad_weight is off by" in text


def test_ours_is_held_to_its_own_limit():
    """Log-sum-exp from bfloat16 logits is good enough for a peer and wrong for us."""
    case = head.HeadCase("tiny", 1.0, torch.bfloat16, **TINY)
    providers = [Contender("peer", logprob), Contender("sepo", logprob, ours=True)]
    peer, ours = run_case(case, providers, rounds=1)
    assert peer.status == "measured"
    assert ours.status == "refused" and "limit 1.00e-04" in ours.reason


@pytest.mark.parametrize("row", [0, 3, 6])  # of the first, the middle and the last block
def test_an_error_of_any_block_is_seen(monkeypatch, row):
    monkeypatch.setattr(precision, "BLOCK", 3)
    true = torch.arange(-7.0, 0.0)[:, None].double()
    for spoilt, expected in ((torch.nan, torch.nan), (9.0, 9 - true[row].item())):
        got = true.float()
        got[row] = spoilt
        found = precision.absolute_error(got, true), precision.relative_error(got, true)
        assert found == pytest.approx((expected, expected / 7), nan_ok=True)


@pytest.mark.parametrize("objective", head.OBJECTIVES)
def test_truth_of_the_head_is_autograd_in_float64(objective):
    inputs = head.HeadCase("tiny", 0.5, torch.float32, **TINY).inputs("cpu")
    hidden = inputs.hidden.double().requires_grad_()
    weight = inputs.weight.double().requires_grad_()
    logp = (hidden[inputs.rows] @ weight.T).log_softmax(-1)
    logp = logp[torch.arange(len(logp)), inputs.targets]
    head.OBJECTIVES[objective](logp, inputs).backward()
    truth = inputs.truth(objective)
    torch.testing.assert_close(truth["logp"], logp.detach())
    torch.testing.assert_close(truth["grad_hidden"], hidden.grad)
    torch.testing.assert_close(truth["grad_weight"], weight.grad)


def test_half_of_the_rows_are_confident():
    case = head.HeadCase("real", 0.3, torch.bfloat16)
    assert case.M == 460
    inputs = head.HeadCase("tiny", 1.0, torch.bfloat16, **TINY | dict(D=64)).inputs("cpu")
    logp = inputs.truth("weighted")["logp"]
    assert (logp > -0.1).sum() == 24
    assert (logp < -2).sum() > 20
    assert (inputs.rows % 16 >= 4).all()  # a prompt's row predicts nothing


@pytest.mark.parametrize("direction", kl.DIRECTIONS)
def test_truth_of_the_kl_is_autograd_in_float64(direction):
    case = kl.KLCase("tiny", direction, dtype=torch.float32, N=24, M=10, D=16, V=101)
    inputs = case.inputs("cpu")
    hidden = inputs.hidden.double().requires_grad_()
    weight = inputs.weight.double().requires_grad_()
    log_p = (hidden[inputs.rows] @ weight.T).log_softmax(-1)
    log_q = (inputs.ref_hidden[inputs.rows].double() @ inputs.ref_weight.double().T).log_softmax(-1)
    a, b = (log_q, log_p) if direction == "ref||policy" else (log_p, log_q)
    divergence = torch.nn.functional.kl_div(b, a, log_target=True, reduction="none").sum(-1)
    logp = log_p[torch.arange(case.M), inputs.targets]
    (logp @ inputs.upstream.double() + divergence @ inputs.upstream_kl.double()).backward()
    true = {"logp": logp, "kl": divergence, "grad_hidden": hidden.grad, "grad_weight": weight.grad}
    errors = inputs.errors({name: x.detach() for name, x in true.items()}, "weighted")
    assert max(errors.values()) < 1e-12


def test_selection_may_differ_only_among_equal_scores():
    inputs = topk.TopkCase("tiny", S=4, shortest=20, longest=30).inputs("cpu")
    inputs.score = (inputs.score * 2).round()  # many ties
    index, cu_rows = inputs._truth
    right = {"index": index.int(), "cu_rows": cu_rows}
    assert inputs.errors(right, "weighted") == inputs.errors(right, "any tie") == {"wrong": 0.0}

    first = int(cu_rows[1])  # segment 0 takes the highest
    worst = inputs.score[index[:first]].min()
    left = set(range(int(inputs.cu_tokens[1]))) - set(index[:first].tolist())
    swapped = index.clone()
    swapped[inputs.score[index[:first]].argmin()] = next(
        t for t in left if inputs.score[t] == worst
    )
    swapped = {"index": swapped, "cu_rows": cu_rows}
    assert inputs.errors(swapped, "any tie") == {"wrong": 0.0}
    assert inputs.errors(swapped, "weighted")["wrong"] > 0

    worse = index.clone()
    worse[0] = next(t for t in left if inputs.score[t] < worst)
    repeated = index.clone()
    repeated[1] = repeated[0]
    strayed = index.clone()
    others = set(range(int(inputs.cu_tokens[1]), len(inputs.score))) - set(index.tolist())
    strayed[0] = next(t for t in others if inputs.score[t] == inputs.score[index[0]])
    for spoilt in (worse, repeated, strayed):
        assert inputs.errors({"index": spoilt, "cu_rows": cu_rows}, "any tie")["wrong"] > 0


def test_rounds_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    turns = measure.Turns(calls, "cpu", {"c": 1})
    for _ in range(3):
        turns.turn()
    assert "".join(order) == "abcabab"
    assert [len(s) for s in turns.seconds.values()] == [3, 3, 1]


def test_peak_counts_what_is_alive_at_once():
    def call():
        torch.empty(1 << 20, dtype=torch.uint8)  # freed before the next
        kept = torch.empty(1 << 20, dtype=torch.uint8)
        torch.empty(1 << 21, dtype=torch.uint8)
        return kept

    assert measure.peak_bytes(call, "cpu") == (1 << 20) + (1 << 21)


def test_share_of_the_roof():
    """The longer of what the product and the copy would take, over the time: by hand."""
    found = measure.Roof("cpu", torch.float32)
    found.turn()
    found._turns.seconds |= {"gemm": [2.0, 1.0, 9.0], "copy": [4.0]}
    assert found.flop_rate == 2 * 32**3 / 2.0 and found.byte_rate == 2 * 2**12 / 4.0
    assert found.share(32**3, 0, 10.0) == pytest.approx(0.1)
    assert found.share(32**3, 2**12, 10.0) == pytest.approx(0.2)


def test_work_of_the_cases_by_hand():
    case = head.HeadCase("tiny", 0.5, torch.bfloat16, **TINY)
    inputs, M = case.inputs("cpu"), 24
    assert inputs.flop == 3 * 2 * M * 16 * 101
    both = 2 * (2 * 101 * 16 + M * 16 + 64 * 16)  # weight, rows, and the gradients, all 2 bytes
    assert inputs.bytes == both + M * (4 + 8 + 4 + 4)
    case = topk.TopkCase("tiny", S=2, shortest=10, longest=10)
    assert case.inputs("cpu").bytes == 4 * 20 + 2 * 4 * 3 + 4 * 2 * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_has_a_speed_where_it_is_right(dtype):
    """Every implementation of this machine, both padded peers, and some that are wrong."""
    from bench.contenders import attention as contenders

    case = attention.AttentionCase("tiny", dtype=dtype, **ATTENTION)

    def plain_causal(inputs):  # over the packed rows: pairs and responses see each other
        leaves = inputs.leaves()
        out = torch.nn.functional.scaled_dot_product_attention(
            *leaves, is_causal=True, enable_gqa=True
        )
        return inputs.result(out.transpose(1, 2), leaves, inputs.upstream)

    def blind(inputs):  # the prompt's gradient of one response only
        found = contenders._causal(inputs)
        return found | {"grad_key": found["grad_key"] * inputs.owned[:, None, :, None]}

    found = [
        *contenders.ATTENTION,
        Contender("plain_causal", plain_causal),
        Contender("blind", blind, objective="padded"),
    ]
    rows = {row.provider: row for row in run_case(case, found, rounds=2)}
    fine = {"sepo", "padded_sdpa", "padded_sdpa_causal"}
    fine |= {"sepo:sdpa"} if rows["sepo"].note == "native" else set()
    assert {name for name, row in rows.items() if row.status == "measured"} == fine
    assert rows["plain_causal"].status == rows["blind"].status == "refused"
    assert "grad_key is off by" in rows["blind"].reason and "grad_value" not in rows["blind"].reason
    assert all(row.reason for row in rows.values() if row.status == "skipped")
    assert rows["sepo"].flop > 0 and rows["sepo"].roof > 0


def test_flex_mask_is_timed_on_its_own():
    """Whole pairs up to the last, and nothing of a GPU."""
    from bench.operations import block_mask

    case = block_mask.MaskCase("tiny", 3000)
    spans = case.inputs("cpu").spans
    assert spans[0][0] == 0 and spans[-1][3] == 3000 and len(spans) > 2
    assert all(one[3] == other[0] for one, other in pairwise(spans))
    (row,) = run_case(case, [block_mask.MASK], rounds=2)
    blocks = -(-3000 // 128)
    assert row.status == "measured" and row.note == f"{len(spans)} pairs, on the host"
    assert row.bytes == 4 * (3 * 3000 + 4 * (blocks + blocks**2))
    assert [x.tokens for x in block_mask.cases("cuda")] == [8192, 32768]
    names = [job.name for job in jobs.jobs(("attention",), device="cpu", cases=("flex-mask-*",))]
    assert names == ["flex-mask-8k", "flex-mask-32k"]


def test_work_of_attention_by_hand():
    """A prompt of 3 rows, a chosen response of 2 and a rejected one of 1."""
    inputs = attention.AttentionCase("tiny", dtype=torch.float32, **ATTENTION).inputs("cpu")
    N = len(inputs.batch.tokens)
    inputs.batch = replace(inputs.batch, spans=((0, 3, 5, 6),))
    prompt, chosen, rejected = 1 + 2 + 3, 4 + 5, 4
    assert inputs.flop == 6 * 2 * 4 * 32 * (prompt + chosen + rejected)
    assert inputs.bytes == 4 * 2 * N * 32 * (4 + 2 + 2 + 4)
