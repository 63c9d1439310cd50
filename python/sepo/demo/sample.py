"""Continuations of openings, sampled in batches; an opening is read once for all of its own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicLayer

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
    for batch in batches([len(prompts[i]) for i, _ in jobs], batch_size):
        asked = sorted({jobs[j][0] for j in batch})
        rows = [asked.index(jobs[j][0]) for j in batch]
        sampled = continue_batch(
            model, [prompts[i] for i in asked], rows, uniform[batch], temperature, stop_ids
        )
        for j, ids in zip(batch, sampled, strict=True):
            opening = jobs[j][0]
            kept = ids[:-1] if ids and ids[-1] in stop_ids else ids
            text = tokenizer.decode(kept, clean_up_tokenization_spaces=False)
            # of several sequences it would be a list
            results[j] = Completion(opening, prompts[opening], ids, str(text))
        if progress is not None:
            progress(len(results), len(jobs))
    model.train(was_training)
    return [results[j] for j in range(len(jobs))]


def continue_batch(
    model: PreTrainedModel,
    prompts: list[list[int]],
    rows: list[int],  # (B,) which prompt each row continues
    uniform: Tensor,  # (B, T) float64 in [0, 1), one number a token
    temperature: float,
    stop_ids: set[int],
) -> list[list[int]]:
    """Sample up to T tokens after each row's prompt; a row ends with its first stop token."""
    device, steps = model.device, uniform.shape[1]
    which, uniform = torch.tensor(rows, device=device), uniform.to(device)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    length = torch.tensor([len(prompt) for prompt in prompts], device=device)
    shortest, longest = int(length.min()), int(length.max())
    layer: Any = lambda: Room(longest + steps)  # the type says a class; it is called like one
    cache = Cache(layer_class_to_replicate=layer)
    # Padded on the right and not masked here: a causal model cannot see what comes later.
    ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt, device=device)
    ends = torch.arange(shortest - 1, longest, device=device)
    out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=ends).logits
    logits = out[which, (length - shortest)[which]]
    cache.batch_select_indices(which)
    length = length[which, None]
    place = torch.arange(longest + steps, device=device)
    seen = (place < length) | (place >= longest)  # all of the cache but the padding

    finished = torch.zeros(len(which), dtype=torch.bool, device=device)
    columns: list[Tensor] = []
    for step in range(steps):
        token = draw(logits, uniform[:, step], temperature)
        columns.append(token)
        finished |= torch.isin(token, stops)
        if finished.all() or step == steps - 1:
            break
        logits = model(
            token[:, None],
            attention_mask=seen[:, : longest + step + 1],
            position_ids=length + step,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, 0]
    return [cut_after_stop(row, stop_ids) for row in torch.stack(columns, dim=1).tolist()]


class Room(DynamicLayer):
    """A layer's keys and values in room for all: DynamicLayer copies what it has at each token."""

    keys: Tensor  # there since the first token, as the other
    values: Tensor

    def __init__(self, size: int):  # tokens
        super().__init__()
        self.size, self.length = size, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        room = lambda x: x.new_empty(*x.shape[:-2], self.size, x.shape[-1])
        self.keys, self.values = room(key_states), room(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[-2]
        self.keys[..., start : self.length, :] = key_states
        self.values[..., start : self.length, :] = value_states
        return self.keys[..., : self.length, :], self.values[..., : self.length, :]

    def get_seq_length(self) -> int:
        return self.length


def draw(
    logits: Tensor,  # (B, V)
    uniform: Tensor,  # (B,) float64 in [0, 1)
    temperature: float,
) -> Tensor:
    """One token per row by inverting the cumulative distribution. Returns (B,) int64."""
    short = -logits.shape[1] % BLOCK
    logits = logits.float()
    if temperature != 1:  # each of these is a pass over all of it, as long as the softmax's
        logits = logits / temperature
    if short:
        logits = torch.nn.functional.pad(logits, (0, short), value=-torch.inf)
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


def batches(
    lengths: list[int],  # prompt tokens of each job
    batch_size: int,
) -> list[list[int]]:
    """Indices of jobs, at most `batch_size` to a batch, by length: little of a batch is padding."""
    order = sorted(range(len(lengths)), key=lambda j: lengths[j])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


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
