"""Ask a model about every response token, in batches under a token budget."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sepo.data import all_positions, pack, truncate
from sepo.data.types import PackedBatch, ScoredPair, TokenPair
from sepo.errors import InputError
from sepo.model.feed import feed
from sepo.model.forward import head, hidden_states
from sepo.model.prepare import prepare_if_new
from sepo.ops import selected_logprob
from sepo.score.products import SplitProducts


@torch.no_grad()
def response_logp(
    model: PreTrainedModel,
    pairs: list[TokenPair],
    role: str,  # for messages
    max_tokens: int,
    # called after each batch with the number of its tokens
    on_batch: Callable[[float], object] = lambda tokens: None,
    *,
    hidden: Tensor | None = None,  # (T_all, D) to fill: chosen and rejected of each pair, in order
    products: SplitProducts | None = None,  # of the model; None: of its own dtype
) -> list[tuple[np.ndarray, np.ndarray]]:  # P x chosen (T1,), rejected (T2,) float32
    """log p(y_t | x, y_<t) in nats for each pair, in the order given, and the states it is read of.

    `max_tokens` bounds a batch, with each prompt counted once. Raises InputError naming the row for
    a pair that is longer, and for a value that is not finite.
    """
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by the pair's place
    lengths = [n for p in pairs for n in (len(p.chosen), len(p.rejected))]
    starts = np.cumsum([0, *lengths])
    logprob = _own_logprob(model) if products is None else products.logprob
    batches = _batches(pairs, max_tokens)
    packs = (partial(_packed, pairs, members) for members in batches)
    with closing(feed(packs, model.device, [model])) as fed:
        for members, packed in zip(batches, fed, strict=True):
            with _exact_float32(), nullcontext() if products is None else products.in_force():
                states = hidden_states(model, packed)
                flat = logprob(states, packed.rows, packed.targets)
            cuts = np.cumsum([0, *(n for i in members for n in lengths[2 * i : 2 * i + 2])])
            segments = np.split(flat.cpu().numpy(), cuts[1:-1])
            for slot, i in enumerate(members):
                found[i] = segments[2 * slot], segments[2 * slot + 1]
                _check_finite(pairs[i].id, found[i], model, role)
                if hidden is not None:  # a pair's two segments lie side by side, here as there
                    rows = packed.rows[cuts[2 * slot] : cuts[2 * slot + 2]]
                    hidden[starts[2 * i] : starts[2 * i + 2]] = states[rows].to(hidden.dtype)
            on_batch(sum(len(pairs[i]) for i in members))
    return [found[i] for i in range(len(pairs))]


def _own_logprob(model: PreTrainedModel) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    weight, bias, scale, softcap = head(prepare_if_new(model))
    return lambda states, rows, targets: selected_logprob(
        states, weight, rows, targets, bias=bias, scale=scale, softcap=softcap
    )


def _packed(pairs: list[TokenPair], members: Sequence[int]) -> PackedBatch:
    """All of those pairs, whole."""
    whole = lambda response: truncate(response, all_positions(len(response)))
    batch = [pairs[i] for i in members]
    return pack([(p.prompt, whole(p.chosen), whole(p.rejected)) for p in batch])


def kept_logp(
    pairs: Sequence[TokenPair],  # of a store
) -> list[tuple[np.ndarray, np.ndarray]]:  # as `response_logp` gave them
    """Read what a store keeps of the reference; nothing is run. Raises InputError where it keeps none."""
    kept = []
    for pair in pairs:
        one = pair if isinstance(pair, ScoredPair) else None
        if one is None or one.chosen_ref_logp is None or one.rejected_ref_logp is None:
            raise InputError(
                f"pair {pair.id}: expected the reference's log-probabilities, got none"
            )
        kept.append((one.chosen_ref_logp, one.rejected_ref_logp))
    return kept


def check_budget(pairs: Sequence[TokenPair], max_tokens: int) -> None:
    """Raise InputError naming the first pair that no batch of `max_tokens` holds."""
    for pair in pairs:
        if len(pair) > max_tokens:
            raise InputError(
                f"pair {pair.id}: {len(pair)} tokens, expected at most --max_tokens_per_batch "
                f"{max_tokens}; the longest pair has {max(map(len, pairs))}"
            )


@contextmanager
def _exact_float32() -> Iterator[None]:
    """float32 products in float32: TF32 keeps 10 bits, and transformers may have switched it on.

    A score is a small difference of two large numbers: see docs/precision.md.
    """
    # torch puts an object in place of the module, which its types don't know
    cpu = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    settings = (torch.backends.cuda.matmul, cpu)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def _check_finite(
    row: str, responses: tuple[np.ndarray, ...], model: PreTrainedModel, role: str
) -> None:
    for side, logp in zip(("chosen", "rejected"), responses, strict=True):
        if (bad := np.flatnonzero(~np.isfinite(logp))).size:
            raise InputError(
                f"pair {row}: the {role} ({dtype_name(model)}) gave the log-probability "
                f"{logp[bad[0]]} to {side} token {bad[0]}, expected a finite number; "
                "check its weights, or score in float32"
            )


def _batches(pairs: list[TokenPair], max_tokens: int) -> list[list[int]]:
    """Indices by length, cut where the next pair would pass the budget."""
    check_budget(pairs, max_tokens)
    batches: list[list[int]] = []
    room = 0
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
