import pytest
import torch
from characters import character_tokenizer
from tiny import tiny_model

from sepo.demo.sample import (
    BLOCK,
    batches,
    continue_batch,
    cut_after_stop,
    draw,
    end_tokens,
    sample,
)

OPENINGS = ["It was", "The film", "We saw", "I"]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


def draw_samples(model, tokenizer, **changes):
    arguments = dict(per_opening=3, max_new_tokens=12, seed=1, batch_size=5)
    return sample(model, tokenizer, OPENINGS, **{**arguments, **changes})


def test_completions_come_in_the_order_of_openings(model, tokenizer):
    found = draw_samples(model, tokenizer)
    assert [c.opening for c in found] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    for completion in found:
        assert tokenizer.decode(completion.prompt_ids) == OPENINGS[completion.opening]
        assert 1 <= len(completion.ids) <= 12


def test_seed_alone_decides(model, tokenizer):
    found = draw_samples(model, tokenizer)
    assert found == draw_samples(model, tokenizer, batch_size=64)
    assert found == draw_samples(model, tokenizer, batch_size=1)
    assert found != draw_samples(model, tokenizer, seed=2)
    assert len({c.text for c in found}) > 6


def test_text_has_no_end_token_and_ids_do(model, tokenizer):
    found = draw_samples(model, tokenizer, per_opening=30, max_new_tokens=40)
    ended = [c for c in found if c.ids[-1] in (0, 1)]
    assert ended
    for completion in found:
        assert not {0, 1} & set(completion.ids[:-1])
        assert "<" not in completion.text
    assert len(ended[0].text) == len(ended[0].ids) - 1


def test_each_token_is_drawn_from_the_distribution_after_its_own_prefix(model):
    prompts, rows = [[5, 9, 30], [7], [7, 2, 2, 11, 40]], [0, 1, 2, 0, 1]
    uniform = torch.rand(5, 6, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    found = continue_batch(model, prompts, rows, uniform, 0.7, set())
    assert len(found) == 5
    for row, ids, u in zip(rows, found, uniform, strict=True):
        assert len(ids) == 6
        for t, token in enumerate(ids):
            prefix = torch.tensor([*prompts[row], *ids[:t]])
            with torch.no_grad():
                cumulative = (
                    (model(prefix[None]).logits[0, -1].double() / 0.7).softmax(-1).cumsum(0)
                )
            assert cumulative[token] > u[t] - 1e-6
            assert token == 0 or cumulative[token - 1] < u[t] + 1e-6


@pytest.mark.parametrize("vocab", [3, BLOCK, BLOCK + 1, 5 * BLOCK + 77])
def test_draw_inverts_the_cumulative_distribution(vocab):
    generator = torch.Generator().manual_seed(vocab)
    logits = 3 * torch.randn(200, vocab, generator=generator)
    uniform = torch.rand(200, dtype=torch.double, generator=generator)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-53])
    token = draw(logits, uniform, 1.5)
    assert token.dtype == torch.int64 and (token < vocab).all()
    cumulative = (logits.double() / 1.5).softmax(-1).cumsum(-1)
    upper = cumulative.gather(1, token[:, None])[:, 0]
    lower = upper - (logits.double() / 1.5).softmax(-1).gather(1, token[:, None])[:, 0]
    assert ((lower < uniform + 1e-6) & (uniform < upper + 1e-6)).all()


def test_draw_never_takes_what_has_no_probability():
    logits = torch.full((64, 2 * BLOCK), -torch.inf)
    logits[:, 300] = 0.0
    uniform = torch.linspace(0, 1 - 2**-53, 64, dtype=torch.double)
    assert (draw(logits, uniform, 1.0) == 300).all()


def test_batches_are_full_and_hold_every_job_once_by_length():
    lengths = [4, 2, 4, 4, 2, 9]
    found = batches(lengths, 4)
    assert [len(batch) for batch in found] == [4, 2]
    order = [j for batch in found for j in batch]
    assert sorted(order) == list(range(6))
    assert [lengths[j] for j in order] == sorted(lengths)


def test_end_of_turn_and_end_of_document_both_end(tokenizer):
    assert end_tokens(tokenizer) == {0, 1}
    assert cut_after_stop([5, 1, 7, 1], {1}) == [5, 1]
    assert cut_after_stop([5, 7], {1}) == [5, 7]


def test_progress_reaches_the_total_and_training_mode_is_kept(tokenizer):
    model, calls = tiny_model("llama").train(), []
    draw_samples(model, tokenizer, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (12, 12) and calls == sorted(calls)
    assert model.training
