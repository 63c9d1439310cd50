"""Ask models about every response token, in batches under a token budget."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from functools import partial
from itertools import tee
from typing import NamedTuple

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

Responses = list[tuple[np.ndarray, np.ndarray]]  # P x chosen (T1,), rejected (T2,) float32, nats


class Asked(NamedTuple):
    """A model that is asked about every response token, and how."""

    model: PreTrainedModel
    products: SplitProducts | None = None  # of the model; None: of its own dtype
    states: torch.dtype | None = None  # of the states that predict the tokens; None: none wanted


class Answer(NamedTuple):
    """Hold what a model says of a block of pairs, in their order."""

    logp: Responses  # log p(y_t | x, y_<t)
    states: Tensor | None  # (T_all, D) as asked, on the CPU: chosen and rejected of each pair


def response_logp(
    model: PreTrainedModel,
    pairs: list[TokenPair],
    role: str,  # for messages
    max_tokens: int,
    # called after each batch with the number of its tokens
    on_batch: Callable[[int], object] = lambda tokens: None,
    *,
    products: SplitProducts | None = None,  # of the model; None: of its own dtype
) -> Responses:
    """log p(y_t | x, y_<t) in nats for each pair, in the order given; see `answers_of`."""
    with closing(answers_of([pairs], {role: Asked(model, products)}, max_tokens, on_batch)) as told:
        _, found = next(told)
    return found[role].logp


@torch.no_grad()
def answers_of(
    blocks: Iterable[list[TokenPair]],  # read one after the other, when their turn comes
    asked: Mapping[str, Asked],  # by role, which messages name
    max_tokens: int,  # of a batch, with each prompt counted once
    # called with the number of a batch's tokens when all models have read it
    on_batch: Callable[[int], object] = lambda tokens: None,
) -> Generator[tuple[list[TokenPair], dict[str, Answer]], None, None]:
    """Yield each block with what the models say of it, by role. Close what is not exhausted.

    A batch holds pairs of one block, so an answer does not depend on what other blocks there are.
    It is made once for all models of a device. Models of different devices read it at the same
    time, and where a device computes the next batch is made meanwhile, also of the next block.
    Raises InputError naming the row for a pair that is longer than `max_tokens`, and for a value
    that is not finite.
    """
    logprobs = {role: _logprob_of(ask) for role, ask in asked.items()}
    devices = [*dict.fromkeys(ask.model.device for ask in asked.values())]
    own, *plans = tee(((b, _batches(b, max_tokens)) for b in blocks), 1 + len(devices))
    with ExitStack() as stack:
        feeds = {}
        for device, plan in zip(devices, plans, strict=True):
            packs = (partial(_packed, block, part) for block, parts in plan for part in parts)
            there = [ask.model for ask in asked.values() if ask.model.device == device]
            feeds[device] = stack.enter_context(closing(feed(packs, device, there)))
        for block, parts in own:
            gathered = {role: _Gathered(block, role, ask) for role, ask in asked.items()}
            for part in parts:
                batches = {device: next(batches) for device, batches in feeds.items()}
                told = {
                    role: _told(ask, logprobs[role], batches[ask.model.device])
                    for role, ask in asked.items()
                }
                for role, values in told.items():  # waits for the devices, which all have begun
                    gathered[role].add(part, *values)
                on_batch(sum(len(block[i]) for i in part))
            yield block, {role: one.answer() for role, one in gathered.items()}


def _logprob_of(ask: Asked) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if ask.products is not None:
        return ask.products.logprob
    weight, bias, scale, softcap = head(prepare_if_new(ask.model))
    return lambda states, rows, targets: selected_logprob(
        states, weight, rows, targets, bias=bias, scale=scale, softcap=softcap
    )


def _told(
    ask: Asked, logprob: Callable[[Tensor, Tensor, Tensor], Tensor], batch: PackedBatch
) -> tuple[Tensor, Tensor | None]:  # logp (M,) float32, states (M, D) as asked
    """Ask a model about a batch, on its device; nothing waits for the answer."""
    with _exact_float32(), nullcontext() if ask.products is None else ask.products.in_force():
        states = hidden_states(ask.model, batch)
        logp = logprob(states, batch.rows, batch.targets)
    return logp, None if ask.states is None else states[batch.rows].to(ask.states)


class _Gathered:
    """Put what a model says, batch after batch, into the order of a block's pairs."""

    def __init__(self, block: list[TokenPair], role: str, ask: Asked):
        self._block, self._role, self._model = block, role, ask.model
        self._lengths = [n for p in block for n in (len(p.chosen), len(p.rejected))]
        self._starts = np.cumsum([0, *self._lengths])
        self._logp: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by the pair's place
        self._states: Tensor | None = None
        if ask.states is not None:
            width = head(ask.model).weight.shape[1]
            self._states = torch.empty(int(self._starts[-1]), width, dtype=ask.states)

    def add(self, part: Sequence[int], logp: Tensor, states: Tensor | None) -> None:
        """Take one batch's, in the order of its pairs."""
        cuts = np.cumsum([0, *(n for i in part for n in self._lengths[2 * i : 2 * i + 2])])
        segments = np.split(logp.cpu().numpy(), cuts[1:-1])
        states = None if states is None else states.cpu()
        for slot, i in enumerate(part):
            self._logp[i] = segments[2 * slot], segments[2 * slot + 1]
            _check_finite(self._block[i].id, self._logp[i], self._model, self._role)
            if self._states is not None and states is not None:
                # a pair's two segments lie side by side, here as there
                own = states[cuts[2 * slot] : cuts[2 * slot + 2]]
                self._states[self._starts[2 * i] : self._starts[2 * i + 2]] = own

    def answer(self) -> Answer:
        return Answer([self._logp[i] for i in range(len(self._block))], self._states)


def _packed(block: list[TokenPair], part: Sequence[int]) -> PackedBatch:
    """All of those pairs, whole."""
    whole = lambda response: truncate(response, all_positions(len(response)))
    pairs = [block[i] for i in part]
    return pack([(p.prompt, whole(p.chosen), whole(p.rejected)) for p in pairs])


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
