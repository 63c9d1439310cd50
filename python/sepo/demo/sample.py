"""Continuations of openings, sampled in batches of equal prompt length, so nothing is padded."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

BLOCK = 256  # vocabulary entries summed together when a token is drawn


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled continuation of one opening."""

    opening: int  # index into the list of openings
    prompt_ids: list[int]
    ids: list[int]  # what was sampled, the end token included if it came
    text: str  # the continuation without its end token, leading space kept


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    openings: list[str],
    *,
    per_opening: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,  # called with (completions done, of all)
) -> list[Completion]:
    """Sample `per_opening` plain-text continuations of every opening, in the order of openings.

    The distribution is the model's own: no top-k, no top-p. Every completion owns its random
    numbers, so `batch_size` changes the result by rounding alone. Openings must not be empty.
    """
    was_training = model.training
    model.eval()
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in openings]
    jobs = [(i, n) for i in range(len(openings)) for n in range(per_opening)]
    uniform = torch.rand(
        len(jobs), max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.double
    )
    stop_ids = end_tokens(tokenizer)
    results: dict[int, Completion] = {}
    for batch in equal_length_batches([len(prompts[i]) for i, _ in jobs], batch_size):
        prompt_ids = torch.tensor([prompts[jobs[j][0]] for j in batch], device=model.device)
        sampled = continue_batch(model, prompt_ids, uniform[batch], temperature, stop_ids)
        for j, ids in zip(batch, sampled, strict=True):
            opening = jobs[j][0]
            kept = ids[:-1] if ids and ids[-1] in stop_ids else ids
            text = tokenizer.decode(kept, clean_up_tokenization_spaces=False)
            results[j] = Completion(opening, prompts[opening], ids, text)
        if progress is not None:
            progress(len(results), len(jobs))
    model.train(was_training)
    return [results[j] for j in range(len(jobs))]


def continue_batch(
    model: PreTrainedModel,
    prompt_ids: Tensor,  # (B, T0) int64, all of one length
    uniform: Tensor,  # (B, T) float64 in [0, 1), one number a token
    temperature: float,
    stop_ids: set[int],
) -> list[list[int]]:
    """Sample up to T tokens for each prompt; a row ends with its first stop token."""
    batch, steps = uniform.shape
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=prompt_ids.device)
    finished = torch.zeros(batch, dtype=torch.bool, device=prompt_ids.device)
    columns: list[Tensor] = []
    inputs, cache = prompt_ids, None
    for step in range(steps):
        out = model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        token = draw(out.logits[:, -1], uniform[:, step].to(prompt_ids.device), temperature)
        columns.append(token)
        finished |= torch.isin(token, stops)
        if finished.all():
            break
        inputs = token[:, None]
    rows = torch.stack(columns, dim=1).tolist()
    return [cut_after_stop(row, stop_ids) for row in rows]


def draw(
    logits: Tensor,  # (B, V)
    uniform: Tensor,  # (B,) float64 in [0, 1)
    temperature: float,
) -> Tensor:
    """One token per row by inverting the cumulative distribution. Returns (B,) int64."""
    short = -logits.shape[1] % BLOCK
    logits = torch.nn.functional.pad(logits.float() / temperature, (0, short), value=-torch.inf)
    blocks = logits.softmax(-1).unflatten(-1, (-1, BLOCK))  # (B, V / BLOCK, BLOCK)
    # Two levels, block then token: a running sum over a whole vocabulary costs more than the
    # model's own step.
    mass = blocks.sum(-1).double()
    block, remainder = invert(mass, uniform[:, None] * mass.sum(-1, keepdim=True))
    inside = blocks.gather(1, block[..., None].expand(-1, 1, BLOCK)).squeeze(1).double()
    token, _ = invert(inside, remainder)
    return (block * BLOCK + token).squeeze(1)


def invert(
    mass: Tensor,  # (B, n) float64 >= 0
    threshold: Tensor,  # (B, 1) float64, from 0 to the row's sum
) -> tuple[Tensor, Tensor]:
    """The first entry whose running sum passes the threshold, (B, 1), and how far into it that is."""
    ends = mass.cumsum(-1)
    # A hair below the sum, where rounding would put the threshold past the last entry.
    threshold = torch.minimum(threshold, ends[:, -1:] * (1 - 1e-12))
    index = torch.searchsorted(ends, threshold, right=True)
    return index, threshold - (ends - mass).gather(1, index)


def equal_length_batches(
    lengths: list[int],  # prompt tokens of each job
    batch_size: int,
) -> list[list[int]]:
    """Indices of jobs, at most `batch_size` to a batch and one prompt length in each."""
    by_length: dict[int, list[int]] = {}
    for j, length in enumerate(lengths):
        by_length.setdefault(length, []).append(j)
    return [
        jobs[start : start + batch_size]
        for _, jobs in sorted(by_length.items())
        for start in range(0, len(jobs), batch_size)
    ]


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids after which a text is over: end of turn, and the end of a document where it differs."""
    vocabulary = tokenizer.get_vocab()
    names = (tokenizer.eos_token, "<|endoftext|>")
    return {vocabulary[name] for name in names if name in vocabulary}


def cut_after_stop(ids: list[int], stop_ids: set[int]) -> list[int]:
    """The ids up to and with the first stop token."""
    for position, token in enumerate(ids):
        if token in stop_ids:
            return ids[: position + 1]
    return ids
