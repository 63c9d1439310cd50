"""The setting of SePO's Table 1 (arXiv 2408.13518), and the work of an epoch in it.

Known of the setting: UltraFeedback's 61 135 pairs, one epoch, 128 pairs a step, 4 A100 of 80 GB, mean
lengths before and after truncation (its Appendix E). The authors' scripts
(github.com/SteveKGYang/SePO, train_selective_llama.sh) say the rest: ZeRO-3, gradient checkpointing, flash attention, a pair
at a time on each GPU, both responses padded to the longer; its loss takes the log-softmax of every row.
"""

from dataclasses import replace
from functools import cache

from sepo.cost import lengths
from sepo.cost.decoder import Decoder, named
from sepo.cost.gpu import GPUS
from sepo.cost.lengths import Lengths
from sepo.cost.work import Schedule, Work, scaled, step_work
from sepo.trainer.methods import METHODS as METHOD

PAIRS, PAIRS_PER_STEP, NUM_GPUS, A100 = 61_135, 128, 4, GPUS["A100"]
FRACTION = 0.3
# prompt and response together: so read, FLOP alone give the 1.75 hours and the ratio of 0.58
MEANS = {"LLaMA": (496, 384), "Pythia": (444, 340)}
PROMPT_SHARE = 0.25  # of the whole sequence; assumed, the paper gives no mean of the prompts
TOKENS_AT_ONCE = 8192  # of our micro-batches

AS_RELEASED = Schedule(packed=False, prompt_once=False, selected=False, checkpointing=True)


@cache
def decoder(model: str) -> Decoder:
    return named(model)


def mean_lengths(model: str) -> tuple[int, int]:  # of a prompt with one response, whole and cut
    return MEANS["Pythia" if model.startswith("Pythia") else "LLaMA"]


def means(model: str) -> tuple[float, float, float]:
    """Tokens of a prompt, a response, a truncated response."""
    whole, cut = mean_lengths(model)
    prompt = PROMPT_SHARE * whole
    return prompt, whole - prompt, cut - prompt


@cache
def data(model: str, spread: float = lengths.SPREAD) -> Lengths:
    return lengths.from_means(*means(model), pairs=PAIRS, spread=spread)


def epoch(
    model: str,
    method: str,
    schedule: Schedule,
    *,
    truncated: bool = True,  # methods that use all tokens have nothing to cut
    spread: float = lengths.SPREAD,
) -> Work:
    """All pairs once, on the paper's GPUs."""
    pairs, positions = data(model, spread), METHOD[method].positions
    sizes = pairs.whole
    if truncated and positions == "selected":
        sizes = pairs.cut
    if truncated and positions == "random":
        sizes = lengths.drawn_at_random(pairs, FRACTION)
    everything = positions == "all"
    rows = pairs.whole[:, 1:].sum() if everything else pairs.selected(FRACTION)
    if METHOD[method].reference and schedule.reference == "none":
        schedule = replace(schedule, reference="live")
    work = step_work(
        decoder(model), sizes, rows, schedule,
        pairs_at_once=1, tokens_at_once=TOKENS_AT_ONCE, gathered_over=NUM_GPUS,
        steps=len(sizes) / PAIRS_PER_STEP, memory=A100.memory,
    )  # fmt: skip
    return scaled(work, pairs.scale)


def sepo_hours_at_full_rate(model: str) -> float:
    """GPU-hours for the layers' products on SePO's tokens, forward and backward, and nothing else."""
    tokens = 2 * PAIRS * mean_lengths(model)[1]
    return 6 * decoder(model).weights * tokens / A100.flop / 3600


def flop_ratio(model: str) -> float:
    """SePO over DPO: three passes over the truncated against four over the whole responses."""
    whole, cut = mean_lengths(model)
    return 3 * cut / (4 * whole)
