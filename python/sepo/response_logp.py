"""The log-probability of every response token, in batches under a token budget."""

import numpy as np
import torch
from transformers import PreTrainedModel

from sepo.data import all_positions, pack, truncate
from sepo.data.types import TokenPair
from sepo.errors import InputError
from sepo.model import token_logprob


@torch.no_grad()
def response_logp(
    model: PreTrainedModel,
    pairs: list[TokenPair],
    role: str,  # for messages
    max_tokens: int,
    on_batch=lambda tokens: None,  # called after each batch with the number of its tokens
) -> list[tuple[np.ndarray, np.ndarray]]:  # P x chosen (T1,), rejected (T2,) float32
    """log p(y_t | x, y_<t) in nats for each pair, in the order given.

    `max_tokens` bounds a batch, with each prompt counted once; a longer pair goes alone. Raises
    InputError naming the row for a value that is not finite.
    """
    result = [None] * len(pairs)
    whole = lambda response: truncate(response, all_positions(len(response)))
    for members in _batches(pairs, max_tokens):
        batch = [pairs[i] for i in members]
        packed = pack([(p.prompt, whole(p.chosen), whole(p.rejected)) for p in batch])
        flat = token_logprob(model, packed.to(model.device)).cpu().numpy()
        segments = np.split(flat, packed.cu_rows[1:-1].numpy())
        for slot, i in enumerate(members):
            result[i] = segments[2 * slot], segments[2 * slot + 1]
            _check_finite(pairs[i].id, result[i], model, role)
        on_batch(sum(map(len, batch)))
    return result


def _check_finite(row: str, responses: tuple[np.ndarray, ...], model, role: str) -> None:
    for side, logp in zip(("chosen", "rejected"), responses, strict=True):
        if (bad := np.flatnonzero(~np.isfinite(logp))).size:
            raise InputError(
                f"row {row}: the {role} ({dtype_name(model)}) gave the log-probability "
                f"{logp[bad[0]]} to {side} token {bad[0]}, expected a finite number; "
                "check its weights, or score in float32"
            )


def _batches(pairs: list[TokenPair], max_tokens: int) -> list[list[int]]:
    """Indices by length, cut where the next pair would pass the budget."""
    batches, room = [], 0
    # shortest first: ties in the data's order, so the same pairs give the same batches
    for i in sorted(range(len(pairs)), key=lambda i: len(pairs[i])):
        if not batches or len(pairs[i]) > room:
            batches.append([])
            room = max_tokens
        batches[-1].append(i)
        room -= len(pairs[i])
    return batches


def dtype_name(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")
