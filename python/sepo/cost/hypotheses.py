"""Named costs that may explain SePO's published hours, fitted to them and held against them.

What is modelled without a published hour (work.py at gpu.py's utilisation) makes a twentieth of them.
So a hypothesis adds terms, each proportional to a constant that nobody published. The constants are
fitted to the 48 figures of Table 1 and the 6 of Table 5's DPO together, by least squares of the
relative error. Published code of the authors (github.com/SteveKGYang/SePO at 82fab6c) is named where
a number is from there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np

from sepo.cost import published
from sepo.cost.gpu import GPUS, hours, part_hours
from sepo.cost.paper import A100, AS_RELEASED, NUM_GPUS, PAIRS, PAIRS_PER_STEP, decoder, epoch
from sepo.cost.work import scaled, step_work, total
from sepo.trainer.methods import METHODS

PCIE = GPUS["A100-PCIe"]
TRAINED, REFERENCE = 3, 1  # passes over the weights: forward, backward, gradients; forward
MAX_LENGTH = 4096  # of train_selective_llama.sh
EVERY, EVALUATED = 275, 4000  # train_dpo_llama.sh: micro-batches between evaluations; their pairs
SOME = "sparsepo", "sepo-rand", "sepo"  # methods whose hours are half of what others' say


class Figure(NamedTuple):
    """One published number of GPU-hours."""

    model: str
    method: str
    hours: float
    oracle: bool = False  # of Table 5

    @property
    def shape(self) -> str:
        return self.model.removesuffix("-Instruct")

    @property
    def passes(self) -> int:
        """Passes over a model's weights for a pair."""
        return TRAINED + REFERENCE * (METHODS[self.method].reference is not None)


POLICIES = tuple(
    Figure(model, method, spent)
    for model, row in published.TABLE_1.items()
    for method, spent in row.items()
)
ORACLES = tuple(Figure(model, "dpo", dpo, True) for model, (_, dpo) in published.TABLE_5.items())
FIGURES = POLICIES + ORACLES


# Terms: GPU-hours of a figure where the constant is 1


@cache
def parts(shape: str, method: str) -> dict[str, float]:
    """GPU-hours by part, as released, at gpu.py's utilisation; a pair at a time on each GPU."""
    return part_hours(epoch(shape, method, AS_RELEASED), A100)


@cache
def computed(shape: str, method: str) -> float:
    """All but gathering."""
    return sum(spent for part, spent in parts(shape, method).items() if part != "gathering")


@cache
def gathered(shape: str, method: str) -> float:
    """By 1 GB/s between GPUs."""
    return total(epoch(shape, method, AS_RELEASED), ("gathering",)).link / 1e9 / 3600


def layered(shape: str, method: str) -> float:
    """With 1 ms a layer and pass, whatever is computed in it."""
    passes = Figure(shape, method, 0).passes
    return 1e-3 * passes * decoder(shape).layers * PAIRS / 3600


@cache
def padded(shape: str, method: str) -> float:
    """Computed, with every response padded to the script's longest."""
    live = METHODS[method].reference is not None
    schedule = replace(AS_RELEASED, reference="live" if live else "none")
    pair = np.array([(1, MAX_LENGTH - 1, MAX_LENGTH - 1)])
    work = step_work(
        decoder(shape), pair, 2 * MAX_LENGTH, schedule, pairs_at_once=1, steps=1 / PAIRS_PER_STEP
    )
    return hours(scaled(work, PAIRS), A100)


def hosted(shape: str, method: str) -> float:
    """AdamW on the host, whose memory moves 1 GB/s while all GPUs wait."""
    work = step_work(
        decoder(shape), np.ones((1, 3)), 1, replace(AS_RELEASED, host_optimiser=True),
        steps=PAIRS / PAIRS_PER_STEP, gathered_over=NUM_GPUS,
    )  # fmt: skip
    return total(work, ("offload",)).host_memory / 1e9 / 3600


# Hypotheses


@dataclass(frozen=True)
class Term:
    unit: str
    of: Callable[[str, str], float]  # shape, method -> GPU-hours
    per_pass: bool = False  # what is done for every pass over the weights
    inverse: bool = False  # the constant is a rate: hours fall with it

    def told(self, constant: float) -> str:
        if self.inverse:
            constant = np.inf if constant == 0 else 1 / constant
        return f"{constant:.3g} {self.unit}"


COMPUTED = Term("x the modelled time", computed)
PADDED = Term("x the modelled time", padded)
HOST = Term("GB/s of host memory", hosted, inverse=True)
GATHERING = Term("GB/s between GPUs", gathered, per_pass=True, inverse=True)
LAYERS = Term("ms a layer and pass", layered, per_pass=True)

Share = Callable[[Figure, Term], float]  # of a term's hours that are a figure's


@dataclass(frozen=True)
class Hypothesis:
    name: str
    terms: tuple[Term, ...]
    computed: bool = True  # what is modelled is in it as it is
    given: tuple[float, ...] | None = None  # constants that are not fitted
    share: Share = lambda figure, term: 1.0

    def row(self, figure: Figure) -> list[float]:
        """GPU-hours: fixed, then of each term with its constant at 1."""
        hours = lambda term: term.of(figure.shape, figure.method) * self.share(figure, term)
        return [hours(COMPUTED) if self.computed else 0.0, *map(hours, self.terms)]


def at_once(some: float = 2, oracles: float = 4) -> Share:
    """Pairs of a micro-batch: of SOME methods, and of the oracles; the others take one."""

    def share(figure: Figure, term: Term) -> float:
        if not term.per_pass:
            return 1.0
        return 1 / (oracles if figure.oracle else some if figure.method in SOME else 1)

    return share


def evaluating(figure: Figure, term: Term) -> float:
    """Policies 2 pairs at a time; but for SOME methods they are evaluated EVERY so often."""
    if figure.oracle:
        return at_once()(figure, term)
    forward = 1 + figure.passes - TRAINED
    pairs = 0 if figure.method in SOME else EVALUATED / (2 * EVERY * NUM_GPUS)  # a trained one
    if term.per_pass:
        return (1 + pairs * forward / figure.passes) / 2
    again = 1  # of checkpointed layers; backward counts two forward passes
    return 1 + pairs * forward / (figure.passes + again)


def machine_hours(figure: Figure, term: Term) -> float:
    """Policies as by at_once; the oracles' hours are a machine's, not its GPUs'."""
    return 1 / NUM_GPUS if figure.oracle else at_once()(figure, term)


def by_readme(figure: Figure, term: Term) -> float:
    """Policies as by at_once; oracles 2 pairs at a time on 2 GPUs, as script and README have them."""
    if not (figure.oracle and term.per_pass):
        return at_once()(figure, term)
    moved = (1 - 1 / 2) / (1 - 1 / NUM_GPUS) if term is GATHERING else 1.0
    return moved / 2


BOTH = GATHERING, LAYERS
AT_ONCE = Hypothesis("h: g, and the oracles 4 pairs", BOTH, share=at_once())
EVALUATING = Hypothesis("k: f, all 2 pairs, evaluations between; oracles 4", BOTH, share=evaluating)
HYPOTHESES = (
    Hypothesis("a: as released, by PCIe; nothing fitted", BOTH[:1], given=(1e9 / PCIE.link,)),
    Hypothesis("b: the GPUs compute more slowly", (COMPUTED,), computed=False),
    Hypothesis(f"c: b, and rows padded to {MAX_LENGTH} tokens", (PADDED,), computed=False),
    Hypothesis("d: AdamW on the host, every step", (HOST,)),
    Hypothesis("e: ZeRO-3 gathers for every pair", BOTH[:1]),
    Hypothesis("f: e, and a layer takes its own time", BOTH),
    Hypothesis("g: f, and some methods 2 pairs at a time", BOTH, share=at_once(oracles=1)),
    AT_ONCE,
    Hypothesis("i: g, and the oracles 2 pairs on 2 GPUs", BOTH, share=by_readme),
    Hypothesis("j: g, and the oracles' hours are the machine's", BOTH, share=machine_hours),
    EVALUATING,
)


class Fit(NamedTuple):
    """Of a hypothesis to figures."""

    constants: np.ndarray  # one a term; none below 0
    figures: tuple[Figure, ...]
    hours: np.ndarray  # modelled

    @property
    def errors(self) -> np.ndarray:  # modelled / published - 1
        return self.hours / np.array([figure.hours for figure in self.figures]) - 1

    def error(self, *, oracles: bool) -> float:
        """Median size, over the figures of one table."""
        chosen = [figure.oracle == oracles for figure in self.figures]
        return float(np.median(abs(self.errors[chosen])))

    def of(self, model: str, method: str) -> float:
        """GPU-hours of a figure."""
        names = [(figure.model, figure.method) for figure in self.figures]
        return float(self.hours[names.index((model, method))])

    def ratio_error(self, method: str, other: str) -> float:
        """Median size, over the policies, of the error of the hours of one method over another's."""
        found = [
            (self.of(model, method) / self.of(model, other)) / (row[method] / row[other]) - 1
            for model, row in published.TABLE_1.items()
        ]
        return float(np.median(np.abs(found)))

    @property
    def jump(self) -> float:
        """DPO of Table 1's smallest policy over that of Table 5's largest Pythia."""
        return self.of("Pythia-2.8B", "dpo") / self.of("Pythia-1.4B", "dpo")

    @property
    def rank_correlation(self) -> float:
        """Spearman's, of Table 1's figures."""
        chosen = [figure for figure in self.figures if not figure.oracle]
        both = [self.of(f.model, f.method) for f in chosen], [f.hours for f in chosen]
        return float(np.corrcoef([ranks(column) for column in both])[0, 1])


def fit(
    hypothesis: Hypothesis,
    to: tuple[Figure, ...] = FIGURES,
    over: tuple[Figure, ...] = FIGURES,  # that are modelled with what was found
) -> Fit:
    """Least squares of the relative error; a constant that would be below 0 is left at 0."""
    rows = np.array([hypothesis.row(figure) for figure in to])
    spent = np.array([figure.hours for figure in to])
    constants = np.array(hypothesis.given or np.zeros(len(hypothesis.terms)))
    free = [] if hypothesis.given else [*range(len(constants))]
    while free:
        columns = rows[:, 1:][:, free] / spent[:, None]
        found = np.linalg.lstsq(columns, 1 - rows[:, 0] / spent, rcond=None)[0]
        if (found >= 0).all():
            constants[free] = found
            break
        free = [number for number, value in zip(free, found, strict=True) if value > 0]
    rows = np.array([hypothesis.row(figure) for figure in over])
    return Fit(constants, over, rows[:, 0] + rows[:, 1:] @ constants)


def best_at_once(to: tuple[Figure, ...] = FIGURES) -> tuple[float, float]:
    """Fit what AT_ONCE takes as 2 and 4: of 1 to 3 and of 2 to 6, in steps of 0.1."""
    grid = [(a / 10, b / 10) for a in range(10, 31) for b in range(20, 61)]
    trial = lambda pair: Hypothesis("", BOTH, share=at_once(*pair))
    return min(grid, key=lambda pair: float((fit(trial(pair), to, to).errors ** 2).sum()))


def ranks(values) -> np.ndarray:  # (n,) from 0; equal values share the mean of their places
    values = np.asarray(values)
    return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])
