"""What K targets a row are for: a teacher's top K, a cached reference's, a sampler's kept ids."""

import pytest
import torch

from sepo.ops import sampled_first, selected_logprob

N, M, D, V, K = 12, 9, 16, 101, 8


@pytest.fixture
def rows():
    return torch.arange(M, dtype=torch.int32) + 2


def head(seed: int):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=g, dtype=torch.float64)
    return hidden, torch.randn(V, D, generator=g, dtype=torch.float64)


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("over", ["vocabulary", "targets"])
def test_distillation_from_a_teachers_top_k(rows, over):
    """sum_k q_k (log q_k - log p_k), with the teacher's q as it is, or normalised over its top K."""
    (hidden, weight), (teacher, teacher_weight) = head(0), head(1)
    log_q = (teacher[rows] @ teacher_weight.T).log_softmax(-1)
    log_q, targets = log_q.topk(K)
    if over == "targets":
        log_q = log_q.log_softmax(-1)
    hidden.requires_grad_(), weight.requires_grad_()

    logp = selected_logprob(hidden, weight, rows, targets, over=over)
    loss = (log_q.exp() * (log_q - logp)).sum(-1).mean()

    z = hidden[rows] @ weight.T
    if over == "targets":
        z = z.gather(-1, targets)
        dense = torch.nn.functional.kl_div(
            z.log_softmax(-1), log_q, log_target=True, reduction="batchmean"
        )
    else:
        log_p = z.log_softmax(-1).gather(-1, targets)
        dense = (log_q.exp() * (log_q - log_p)).sum() / M
    torch.testing.assert_close(loss, dense)
    for a, b in zip(gradients(loss, hidden, weight), gradients(dense, hidden, weight), strict=True):
        torch.testing.assert_close(a, b)


def test_distillation_of_all_ids_is_the_whole_kl(rows):
    """With K = V the sum over the targets is KL(teacher || student)."""
    (hidden, weight), (teacher, teacher_weight) = head(0), head(1)
    log_q = (teacher[rows] @ teacher_weight.T).log_softmax(-1)
    logp = selected_logprob(hidden, weight, rows, torch.arange(V).expand(M, V))
    kl = torch.nn.functional.kl_div(
        (hidden[rows] @ weight.T).log_softmax(-1), log_q, log_target=True, reduction="sum"
    )
    torch.testing.assert_close((log_q.exp() * (log_q - logp)).sum(), kl)


def top_p(p: torch.Tensor, most: float) -> list[torch.Tensor]:
    """The ids that top-p sampling keeps of each row: the fewest that hold `most`, best first."""
    value, order = p.sort(-1, descending=True)
    count = ((value.cumsum(-1) - value) < most).sum(-1)
    return [ids[:n] for ids, n in zip(order, count.tolist(), strict=True)]


def test_replay_of_top_p_sampling(rows):
    """From a mask as vLLM returns it, ids end to end: the sampler's own numbers, and their gradient."""
    hidden, weight = head(0)
    hidden.requires_grad_(), weight.requires_grad_()
    z = hidden[rows] @ weight.T
    kept = top_p(z.detach().softmax(-1), 0.9)
    token_ids, counts = torch.cat(kept), [len(ids) for ids in kept]
    assert min(counts) < max(counts) < V
    sampled = torch.stack([ids[len(ids) // 2] for ids in kept])

    padded = torch.nn.utils.rnn.pad_sequence(
        token_ids.split(counts), batch_first=True, padding_value=-1
    )
    targets = sampled_first(sampled, padded)
    logp = selected_logprob(hidden, weight, rows, targets, over="targets")[:, 0]

    outside = torch.ones(M, V, dtype=torch.bool)
    for row, ids in enumerate(kept):
        outside[row, ids] = False
    dense = z.masked_fill(outside, -torch.inf).log_softmax(-1).gather(-1, sampled[:, None])[:, 0]
    torch.testing.assert_close(logp, dense)
    up = torch.randn(M, dtype=torch.float64)
    for a, b in zip(
        gradients(logp @ up, hidden, weight), gradients(dense @ up, hidden, weight), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_what_was_the_only_choice_is_certain(rows):
    hidden, weight = head(0)
    weight.requires_grad_()
    sampled = torch.arange(M)
    targets = sampled_first(sampled, torch.stack([sampled, torch.full((M,), -1)], 1))
    logp = selected_logprob(hidden, weight, rows, targets, over="targets")
    logp[:, 0].sum().backward()
    assert torch.equal(logp, torch.zeros_like(logp)) and not weight.grad.any()


def test_the_sampled_id_comes_first_and_once():
    kept = torch.tensor([[4, 9, 2], [7, -1, -1], [5, 5, 1]])
    found = sampled_first(torch.tensor([9, 7, 5]), kept)
    assert found.tolist() == [[9, 4, -1, 2], [7, -1, -1, -1], [5, -1, -1, 1]]


def test_a_sampled_id_that_was_not_kept_is_named():
    kept = torch.tensor([[4, 9, 2], [7, 8, -1]])
    message = "expected sampled ids among the kept, got 3 in row 1, which was not kept"
    with pytest.raises(ValueError, match=message):
        sampled_first(torch.tensor([9, 3]), kept)


@pytest.mark.parametrize(
    ("sampled", "kept", "message"),
    [
        (torch.zeros(2, 1).long(), torch.zeros(2, 3).long(), r"got \(2, 1\) and \(2, 3\)"),
        (torch.zeros(2).long(), torch.zeros(3, 3).long(), r"got \(2,\) and \(3, 3\)"),
        (torch.zeros(2).int(), torch.zeros(2, 3).long(), "int64 ids, got torch.int32 and"),
    ],
)
def test_sampled_first_refuses(sampled, kept, message):
    with pytest.raises(ValueError, match=message):
        sampled_first(sampled, kept)


def test_sampled_first_compiles(rows):
    compiled = torch.compile(sampled_first, fullgraph=True, backend="aot_eager")
    sampled, kept = torch.tensor([9, 7]), torch.tensor([[4, 9, 2], [7, 8, -1]])
    assert torch.equal(compiled(sampled, kept), sampled_first(sampled, kept))
