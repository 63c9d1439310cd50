"""SePO's published hours beside the model, by named parts, as text."""

import textwrap
from functools import cache, partial

import numpy as np

from sepo.cost import hypotheses, lengths, paper, published
from sepo.cost.gpu import UTILISATION, hours
from sepo.cost.hypotheses import (
    AT_ONCE,
    EVALUATED,
    EVALUATING,
    EVERY,
    FIGURES,
    GATHERING,
    HYPOTHESES,
    LAYERS,
    POLICIES,
    SOME,
    Figure,
    Fit,
    Hypothesis,
    fit,
    parts,
)  # fmt: skip
from sepo.cost.paper import A100, decoder
from sepo.cost.planner import STATE
from sepo.cost.work import Schedule, scaled, step_work

NAMES = {
    "dpo": "DPO", "ipo": "IPO", "rrhf": "RRHF", "simpo": "SimPO", "tdpo1": "TDPO",
    "sparsepo": "SparsePO", "sepo-rand": "SePO-rand", "sepo": "SePO",
}  # fmt: skip
SFT_LENGTH, SFT_AT_ONCE, SFT_STEP = 2048, 32, 512  # train_sft_llama.sh; the paper's step
ORACLE_OF = {"LLaMA": "TinyLlama-1.1B", "Pythia": "Pythia-1.4B"}  # shares the policy's tokenizer
fitted = cache(fit)
wrap = partial(textwrap.wrap, width=100)


def verdict() -> list[list[str]]:
    """Each part is a block of lines."""
    return [_hypotheses(), _table_1(), _table_5(), _parts(), _own_hours()]


def _hypotheses() -> list[str]:
    lines = [
        f"Which costs the paper's hours are: {len(POLICIES)} figures of Table 1, "
        f"{len(FIGURES) - len(POLICIES)} of Table 5's DPO",
        f"{'median errors of':55}{'Table 1':>9}{'Table 5':>9}{'/DPO':>8}{'/SimPO':>8}{'jump':>7}",
    ]
    for hypothesis in HYPOTHESES:
        found = fitted(hypothesis)
        told = "; ".join(
            term.told(value) for term, value in zip(hypothesis.terms, found.constants, strict=True)
        )
        tables = (found.error(oracles=oracles) for oracles in (False, True))
        ratios = (found.ratio_error("sepo", other) for other in ("dpo", "simpo"))
        errors = "".join(f"{x:9.0%}" for x in tables) + "".join(f"{x:8.0%}" for x in ratios)
        lines += [f"{hypothesis.name:55}{errors}{found.jump:7.1f}", f"   {told}"]
    spent = {f.model: f.hours for f in FIGURES if f.method == "dpo"}
    lines.append(f"{'published':89}{spent['Pythia-2.8B'] / spent['Pythia-1.4B']:7.1f}")
    some, oracles = hypotheses.best_at_once()
    few = fit(AT_ONCE, tuple(f for f in POLICIES if f.method == "dpo"))
    two_models = (STATE + 2) * decoder("LLaMA2-13B").parameters / paper.NUM_GPUS
    about = (
        f"Modelled time: at {UTILISATION:.0%} of the rate, as the other tables have it. Constants are "
        f"fitted to all {len(FIGURES)}. /DPO, /SimPO: SePO over them. Jump: Pythia-2.8B's DPO over the "
        f"oracle Pythia-1.4B's. Some methods: {', '.join(NAMES[m] for m in SOME)}. Evaluations: of the "
        f"other five, every {EVERY} micro-batches, on {EVALUATED} pairs. The 2 and the 4 of h, fitted "
        f"too: {some:.1f} and {oracles:.1f}. h fitted to the six DPO policies alone says Table 1 within "
        f"{few.error(oracles=False):.0%} and Table 5's DPO within {few.error(oracles=True):.0%} "
        f"(medians). Rank correlation over Table 1: a {fitted(HYPOTHESES[0]).rank_correlation:.2f}, k "
        f"{fitted(EVALUATING).rank_correlation:.2f}. Two models at once force nothing: LLaMA2-13B's DPO "
        f"holds {two_models / 1e9:.0f} GB of each GPU's {A100.memory / 1e9:.0f}."
    )
    return [*lines, *wrap(about)]


def _table_1() -> list[str]:
    found = fitted(EVALUATING)
    lines = [
        "Table 1, GPU-hours: published, and modelled by k",
        f"{'':11}" + "".join(f"{model:>19}" for model in published.TABLE_1),
    ]
    for method in published.METHODS:
        cells = "".join(
            f"{row[method]:11.1f}{found.of(model, method):8.1f}"
            for model, row in published.TABLE_1.items()
        )
        lines.append(f"{NAMES[method]:11}{cells}")
    for other in ("dpo", "simpo"):
        cells = "".join(
            f"{row['sepo'] / row[other]:11.2f}{found.of(model, 'sepo') / found.of(model, other):8.2f}"
            for model, row in published.TABLE_1.items()
        )
        lines.append(f"{'SePO/' + NAMES[other]:11}{cells}")
    return lines


def _table_5() -> list[str]:
    found = fitted(EVALUATING)
    lines = [
        "Table 5, GPU-hours of the oracles: DPO published and modelled by k, SFT published and computed",
        f"{'':16}{'DPO':>8}{'modelled':>10}{'SFT':>9}{'computed':>10}",
    ]
    for model, (sft, dpo) in published.TABLE_5.items():
        modelled = f"{found.of(model, 'dpo'):10.2f}"
        lines.append(f"{model:16}{dpo:8.2f}{modelled}{sft:9.2f}{_sft(model):10.2f}")
    about = (
        f"Computed: at {UTILISATION:.0%} of the rate alone, as the SFT's script has it: ZeRO-2, "
        f"{SFT_AT_ONCE} dialogues at a time, padded, cut at {SFT_LENGTH} tokens; their mean of "
        f"{published.DIALOGUE_TOKENS:.0f} is a public run's. Nothing is fitted to the SFT."
    )
    return [*lines, *wrap(about)]


@cache
def _sft(model: str) -> float:
    pairs = published.DIALOGUES * published.SFT_EPOCHS
    drawn = lengths.from_means(1, published.DIALOGUE_TOKENS - 1, pairs=pairs)
    sizes = np.minimum(drawn.whole, (1, SFT_LENGTH - 1, 0))
    schedule = Schedule(
        packed=False, prompt_once=False, selected=False, checkpointing=True, responses=1
    )
    work = step_work(
        decoder(model), sizes, sizes[:, 1].sum(), schedule,
        pairs_at_once=SFT_AT_ONCE, steps=len(sizes) / SFT_STEP,
    )  # fmt: skip
    return hours(scaled(work, drawn.scale), A100)


def _parts() -> list[str]:
    """Return what is published and not modelled."""
    shown = (
        Figure("Pythia-1.4B", "dpo", published.TABLE_5["Pythia-1.4B"][1], True),
        *(
            Figure(model, method, published.TABLE_1[model][method])
            for model, method in (
                ("Pythia-2.8B", "dpo"), ("LLaMA3-8B", "dpo"), ("LLaMA3-8B", "simpo"), ("LLaMA3-8B", "sepo")
            )
        ),
    )  # fmt: skip
    columns = [by_part(figure) for figure in shown]
    names = [f"{figure.model}, {NAMES[figure.method]}" for figure in shown]
    lines = ["By parts of k, GPU-hours", f"{'':26}" + "".join(f"{name:>19}" for name in names)]
    for part in columns[0]:
        lines.append(f"{part:26}" + "".join(f"{column[part]:19.2f}" for column in columns))
    left = [f.hours - sum(column.values()) for f, column in zip(shown, columns, strict=True)]
    lines.append(f"{'left':26}" + "".join(f"{hours:19.2f}" for hours in left))
    lines.append(f"{'published':26}" + "".join(f"{figure.hours:19.2f}" for figure in shown))
    oracle, policy, *_ = shown
    as_policy = sum(by_part(oracle._replace(oracle=False)).values())
    passes = [EVALUATING.share(figure, GATHERING) * figure.passes for figure in (oracle, policy)]
    about = (
        f"Of the jump: as a policy the oracle would take {as_policy:.1f}, and {policy.model} takes "
        f"{sum(columns[1].values()) / as_policy:.2f} times that for its size. The rest is passes over "
        f"the weights for a pair, {passes[1]:.2f} instead of {passes[0]:.2f}."
    )
    return [*lines, *wrap(about)]


def by_part(
    figure: Figure, hypothesis: Hypothesis = EVALUATING, found: Fit | None = None
) -> dict[str, float]:
    """GPU-hours of a figure by what causes them. Their sum is what the hypothesis says."""
    found = found or fitted(hypothesis)
    split = parts(figure.shape, figure.method)
    _, *terms = hypothesis.row(figure)
    constants = dict(zip(hypothesis.terms, found.constants, strict=True))
    spent = {
        term: hours * constants[term] for term, hours in zip(hypothesis.terms, terms, strict=True)
    }
    named = {
        "needed": sum(split[name] for name in ("trunk", "attention", "head", "reference")),
        "layers made again": split["recomputation"],
        "padding": split["padding"],
        "logits that no loss reads": split["unused logits"],
        "AdamW": split["optimiser"],
    }
    evaluated = hypothesis.row(figure)[0] - sum(named.values())
    named["evaluations, computing"] = max(0.0, evaluated)
    return named | {"gathering": spent[GATHERING], "a layer's own time": spent[LAYERS]}


def _own_hours() -> list[str]:
    lines = [
        "In the paper's own hours: runs after which the oracle has paid",
        f"{'':20}{'oracle':>16}{'SFT + DPO':>11}{'than DPO':>18}{'than SimPO':>18}",
    ]
    for model, row in published.TABLE_1.items():
        oracle = ORACLE_OF["Pythia" if model.startswith("Pythia") else "LLaMA"]
        paid = sum(published.TABLE_5[oracle])
        whole, cut = paper.mean_lengths(model)
        by_length = {"dpo": 1 - paper.flop_ratio(model), "simpo": 1 - cut / whole}
        cells = ""
        for other, share in by_length.items():
            measured, tokens = paid / (row[other] - row["sepo"]), paid / (share * row[other])
            cells += f"{measured:10.2f} ({tokens:.2f})"
        lines.append(f"{model:20}{oracle:>16}{paid:11.2f}{cells}")
    about = (
        "In brackets: if SePO saved what its mean lengths save (and DPO's reference), no more. Scoring "
        "is in neither table of the paper, and not in this one. If Table 5's hours are those of a "
        f"machine of {paper.NUM_GPUS} GPUs, all are {paper.NUM_GPUS} times as many."
    )
    return [*lines, *wrap(about)]
