"""FLOP, bytes and traffic of a step, each under the part of the step that causes it.

What the model needs for the tokens it reads and the loss uses:

trunk            products of the layers, and the norms and activations between them
attention        queries and keys that the causal mask shows
head             logits of the tokens that the loss uses, and of those that a rule chooses them from
reference        the same of a live reference, forward only; or its head, on cached rows

What is done besides:

recomputation    checkpointed layers, and the scores that flash attention makes again in backward
padding          all of the above for tokens that are none
hidden scores    queries and keys that the mask hides, where the kernel computes them
unused logits    of prompts, padding and what else the loss does not read
optimiser        AdamW: moments and master weights
gathering        weights and gradients that ZeRO-3 moves, for every micro-batch
offload          what moves between host and GPU, and the host's AdamW
"""

from collections import defaultdict
from dataclasses import astuple, dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from sepo.cost.decoder import Decoder
from sepo_kernels.schedules import DEFAULT_BUDGET, MEMORY_SHARE

NEEDED = ("trunk", "attention", "head", "reference")
EXTRA = (
    "recomputation", "padding", "hidden scores", "unused logits", "optimiser", "gathering", "offload",
)  # fmt: skip
PARTS = (*NEEDED, *EXTRA)
ADAMW = 30  # bytes a parameter: gradient, master, two moments read, three written, 16-bit weights
GRADIENT = 8  # bytes a weight and micro-batch: float32, read and written
LOGITS = 8  # times that plain PyTorch reads or writes the logits for a log-softmax and its gradient


@dataclass(frozen=True)
class Schedule:
    """How a step is computed; the default is this project's."""

    packed: bool = True  # end to end; else a response a row, padded to the longest of all
    prompt_once: bool = True  # for both responses; padded rows never do
    selected: bool = True  # logits of the tokens that the loss uses, made by the fused operation
    reference: Literal["none", "live", "cached"] = "none"
    kl: bool = False  # the loss needs both distributions: the reference's head, cached or not
    kept: float | None = None  # share of the tokens that a rule keeps, having seen all of them
    checkpointing: bool = False  # layers again in backward
    recompute_cheap: bool = False  # norms and activations again in backward, no product
    head_again: bool | None = (
        None  # logits again in backward; None: if they exceed the head's budget
    )
    frozen: bool = False  # weights, the head's too: adapters are trained
    adapter_rank: int = 0
    hidden_scores: bool = False  # attention computes what the mask hides
    host_optimiser: bool = False  # AdamW runs on the host, in its memory
    host_reference: bool = False  # the reference's weights come from there for every micro-batch
    responses: Literal[1, 2] = 2  # 1: the chosen alone, as SFT reads them


OURS = Schedule()


@dataclass(frozen=True)
class Amount:
    flop: float = 0.0
    bytes: float = 0.0  # through the GPU's memory
    link: float = 0.0  # bytes between GPUs
    host: float = 0.0  # bytes between host and GPU
    host_memory: float = 0.0  # bytes through the host's memory, while all GPUs wait

    def __add__(self, other: "Amount") -> "Amount":
        both = zip(astuple(self), astuple(other), strict=True)
        return Amount(*(a + b for a, b in both))

    def __mul__(self, factor: float) -> "Amount":
        return Amount(*(a * factor for a in astuple(self)))


# part and kind of kernel: kernels of different kinds never run at the same time
Work = dict[tuple[str, str], Amount]


class Size(NamedTuple):
    """Count what goes through the trunk."""

    tokens: float
    pairs: float  # of a query and a key that it may see


def total(work: Work, parts: tuple[str, ...] = PARTS) -> Amount:
    return sum((amount for (part, _), amount in work.items() if part in parts), Amount())


def scaled(work: Work, factor: float) -> Work:
    return {key: amount * factor for key, amount in work.items()}


def step_work(
    decoder: Decoder,
    sizes: np.ndarray,  # (P, 3) tokens read of prompt, chosen, rejected
    rows: float,  # tokens that the loss uses
    schedule: Schedule = OURS,
    *,
    pairs_at_once: int | None = None,  # of a padded micro-batch, in the order given; None: all
    tokens_at_once: int | None = None,  # of a packed micro-batch; None: all
    steps: float = 0,  # of the optimiser
    gathered_over: int = 1,  # GPUs that share the weights
    reference: Decoder | None = None,  # None: of the policy's shape
    memory: float | None = None,  # bytes of the GPU; None: a CPU
) -> Work:
    """Forward and backward of all pairs."""
    sizes = np.asarray(sizes, np.float64).reshape(-1, 3)
    needed = needed_size(sizes, schedule)
    run, micro_batches = run_size(sizes, schedule, pairs_at_once, tokens_at_once)
    work: Work = defaultdict(Amount)
    reference = reference or decoder
    _add(work, layers(decoder, reference, needed, schedule, micro_batches))
    more = Size(run.tokens - needed.tokens, run.pairs - needed.pairs)
    for (_, kernel), amount in layers(decoder, reference, more, schedule, 0).items():
        work["padding", kernel] += amount
    if schedule.hidden_scores:
        hidden = Size(0, square_pairs(sizes, schedule, pairs_at_once) - run.pairs)
        for (_, kernel), amount in layers(decoder, reference, hidden, schedule, 0).items():
            work["hidden scores", kernel] += amount
    if schedule.head_again is None:
        kept = 1.0 if schedule.kept is None else schedule.kept
        entries = kept * rows / micro_batches * decoder.vocabulary
        # TDPO's operation keeps two blocks; plain PyTorch keeps whatever there is
        budget = DEFAULT_BUDGET if memory is None else memory // MEMORY_SHARE
        fits = (4 if schedule.kl else 2) * entries <= budget
        schedule = replace(schedule, head_again=schedule.selected and not fits)
    all_rows = rows if schedule.selected else run.tokens
    _add(work, heads(decoder, reference, rows, all_rows, schedule, micro_batches))
    trained = decoder.parameters
    if schedule.frozen:
        trained = decoder.adapter_weights(schedule.adapter_rank)
    state = steps * ADAMW * trained
    if schedule.host_optimiser:  # 16-bit gradients down, weights up
        moved = 4 * steps * trained
        work["offload", "host"] += Amount(host=moved, host_memory=state * gathered_over)
    else:
        work["optimiser", "state"] += Amount(bytes=state)
    if schedule.host_reference and schedule.reference == "live":
        share = reference.parameters / gathered_over  # every GPU fetches its own
        work["offload", "host"] += Amount(host=2 * share * micro_batches)
    passes = 2 if schedule.frozen else 3  # forward, backward, gradients
    moved = passes * decoder.parameters
    if schedule.reference == "live":
        moved += reference.parameters
    share = 1 - 1 / gathered_over
    work["gathering", "link"] += Amount(link=2 * moved * share * micro_batches)
    return dict(work)


def forward_work(
    decoder: Decoder,
    sizes: np.ndarray,  # (P, 3)
    rows: float,
    *,
    tokens_at_once: int | None = None,
) -> Work:
    """A pass without a gradient over packed pairs, as scoring makes it."""
    size = needed_size(np.asarray(sizes, np.float64), OURS)
    _, micro_batches = run_size(sizes, OURS, None, tokens_at_once)
    logits = _products(decoder, rows, micro_batches)
    return reference_layers(decoder, size, micro_batches) | {("reference", "logits"): logits}


def needed_flop(work: Work) -> float:
    """Neither padding nor logits of rows that the loss does not use, nor what is computed again."""
    return total(work, NEEDED).flop


# What goes through the trunk


def causal(tokens):
    return tokens * (tokens + 1) / 2


def needed_size(sizes: np.ndarray, schedule: Schedule) -> Size:
    prompt, *responses = sizes.T
    responses = responses[: schedule.responses]
    pairs = sum(causal(prompt + response) for response in responses)
    copies = len(responses)
    if schedule.prompt_once and schedule.packed:
        pairs = pairs - (copies - 1) * causal(prompt)
        copies = 1
    return Size(float((copies * prompt + sum(responses)).sum()), float(pairs.sum()))


def run_size(
    sizes: np.ndarray,
    schedule: Schedule,
    pairs_at_once: int | None,
    tokens_at_once: int | None,
) -> tuple[Size, int]:  # with padding; micro-batches
    if schedule.packed:
        size = needed_size(sizes, schedule)
        return size, -(-int(size.tokens) // tokens_at_once) if tokens_at_once else 1
    rows = padded_rows(sizes, schedule, pairs_at_once)
    at_once = pairs_at_once or len(sizes)
    return Size(float(rows.sum()), float(causal(rows).sum())), -(-len(sizes) // at_once)


def padded_rows(
    sizes: np.ndarray, schedule: Schedule, pairs_at_once: int | None
) -> np.ndarray:  # (2P,) tokens, (P,) where one response is read
    prompt, *responses = sizes.T
    rows = np.stack([prompt + response for response in responses[: schedule.responses]])
    starts = np.arange(0, len(sizes), pairs_at_once or len(sizes))
    longest = np.maximum.reduceat(rows.max(0), starts)
    return np.repeat(longest, len(rows) * np.diff([*starts, len(sizes)]))


def square_pairs(sizes: np.ndarray, schedule: Schedule, pairs_at_once: int | None) -> float:
    """Pairs of a query and a key without a causal mask, each response at its prompt."""
    if not schedule.packed:
        return float((padded_rows(sizes, schedule, pairs_at_once) ** 2).sum())
    prompt, *responses = sizes.T
    first, *others = responses[: schedule.responses]
    squares = (prompt + first) ** 2
    for response in others:
        queries = response if schedule.prompt_once else prompt + response
        squares = squares + queries * (prompt + response)
    return float(squares.sum())


# What it costs


def layers(
    decoder: Decoder,
    reference: Decoder,
    size: Size,
    schedule: Schedule,
    micro_batches: int,  # in each of which all weights are read
) -> Work:
    """Everything between embedding and head. It is linear in `size` and `micro_batches`."""
    forward, norms = decoder.passes.forward, decoder.passes.backward
    work: Work = defaultdict(Amount)
    trained = 0 if schedule.frozen else 1
    adapters = decoder.adapter_weights(schedule.adapter_rank)
    work["trunk", "products"] = Amount(
        2 * size.tokens * ((2 + trained) * decoder.weights + 3 * adapters),
        (4 + trained * GRADIENT) * decoder.weights * micro_batches
        + (2 + trained) * 2 * decoder.ends * size.tokens,
    )
    elementwise = decoder.elementwise(forward) + decoder.elementwise(norms)
    work["trunk", "elementwise"] = Amount(bytes=elementwise * size.tokens)
    scores = score_flop(decoder, size)
    inputs = 4 * decoder.layers * (decoder.query_width + decoder.key_width) * size.tokens
    work["attention", "attention"] = Amount(6 * scores, 3 * inputs)
    again = Amount(scores)  # the weights of the values, which flash attention does not keep
    if schedule.checkpointing:
        again += Amount(2 * scores, inputs)
        # torch stops when all that backward needs is there: the last product's input is the last
        weights = decoder.weights - decoder.last_weights
        work["recomputation", "products"] = Amount(
            2 * size.tokens * (weights + adapters),
            2 * weights * micro_batches + 2 * decoder.ends * size.tokens,
        )
    if schedule.checkpointing or schedule.recompute_cheap:
        bytes = decoder.elementwise(forward) * size.tokens
        work["recomputation", "elementwise"] = Amount(bytes=bytes)
    work["recomputation", "attention"] = again
    if schedule.reference == "live":
        _add(work, reference_layers(reference, size, micro_batches))
    return work


def reference_layers(reference: Decoder, size: Size, micro_batches: int) -> Work:
    tokens = size.tokens
    inputs = 4 * reference.layers * (reference.query_width + reference.key_width) * tokens
    weights = reference.weights
    return {
        ("reference", "products"): Amount(
            2 * tokens * weights, 2 * weights * micro_batches + 2 * reference.ends * tokens
        ),
        ("reference", "elementwise"): Amount(
            bytes=reference.elementwise(reference.passes.forward) * tokens
        ),
        ("reference", "attention"): Amount(2 * score_flop(reference, size), inputs),
    }


def score_flop(decoder: Decoder, size: Size) -> float:
    """Of one product with queries and keys, or weights and values."""
    return 2 * decoder.layers * decoder.query_width * size.pairs


def heads(
    decoder: Decoder,
    reference: Decoder,
    rows: float,  # that the loss uses
    all_rows: float,  # whose logits are made
    schedule: Schedule,
    micro_batches: int,
) -> Work:
    work: Work = defaultdict(Amount)
    count = 2 if schedule.frozen else 3
    kept = rows
    if schedule.kept is not None:  # without a gradient at all rows, then with one at few
        kept = schedule.kept * rows
        work["head", "logits"] += _products(decoder, rows, micro_batches)
    work["head", "logits"] += _products(decoder, kept, micro_batches, count)
    referenced = schedule.reference == "live" or (schedule.reference == "cached" and schedule.kl)
    if referenced:
        work["reference", "logits"] = _products(reference, rows, micro_batches)
    if schedule.head_again:
        work["recomputation", "logits"] += _products(decoder, kept, micro_batches)
        if schedule.kl:
            work["recomputation", "logits"] += _products(reference, rows, micro_batches)
    unused = all_rows - rows
    more = _products(decoder, unused, 0, count)
    if referenced:
        more += _products(reference, unused, 0)
    if not schedule.selected:  # plain PyTorch, of every row
        more += Amount(bytes=LOGITS * 2 * all_rows * decoder.vocabulary)
    work["unused logits", "logits"] = more
    return work


def _products(of: Decoder, rows: float, reads: int, count: int = 1) -> Amount:
    """With the head's weight, which is read so many times each."""
    entries = of.vocabulary * of.width
    moved = 2 * (rows * (of.width + of.vocabulary) + entries * reads)
    return Amount(2 * rows * entries, moved) * count


def _add(work: Work, more: Work) -> None:
    for key, amount in more.items():
        work[key] += amount
