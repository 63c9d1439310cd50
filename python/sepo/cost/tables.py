"""GPU-hours of SePO's Table 1 and of this project's schedule: modelled, not measured."""

from dataclasses import replace

from sepo.cost import paper, published
from sepo.cost.decoder import TABLE_1
from sepo.cost.gpu import (
    BANDWIDTH_SHARE,
    GPU,
    GPUS,
    HOST_LINK,
    HOST_MEMORY,
    UTILISATION,
    hours,
    hours_at_full_rate,
    part_hours,
)
from sepo.cost.lengths import SPREAD
from sepo.cost.paper import A100, AS_RELEASED, epoch
from sepo.cost.public import ZEPHYR
from sepo.cost.verdict import NAMES, verdict, wrap
from sepo.cost.work import EXTRA, NEEDED, Schedule, Work

SPLIT = "LLaMA3-8B"
PAPER_RATE = 0.02  # what the paper's hours are of an A100's
PCIE = GPUS["A100-PCIe"]
OURS = Schedule(checkpointing=True)  # without it 8192 tokens of a 7B hold some 75 GB
CACHED = replace(OURS, reference="cached")
PACKED = replace(OURS, prompt_once=False, selected=False)
ONCE = replace(OURS, selected=False)
SAVINGS = {  # of each method: a line, its schedule, whether responses are cut
    "dpo": (
        ("padded, every logit, live reference", AS_RELEASED, False),
        ("packed, 8192 tokens a micro-batch", PACKED, False),
        ("the prompt once for both responses", ONCE, False),
        ("logits of the responses only", OURS, False),
        ("the reference's log-probabilities kept", CACHED, False),
    ),
    "sepo": (
        ("padded, every logit, whole responses", AS_RELEASED, False),
        ("packed, 8192 tokens a micro-batch", PACKED, False),
        ("the prompt once for both responses", ONCE, False),
        ("cut after the last selected token", ONCE, True),
        ("logits of the selected tokens only", OURS, True),
        ("norms alone made again, where it fits", Schedule(recompute_cheap=True), True),
    ),
}


def table1() -> str:
    """All tables, as text."""
    parts = [_heading(), _table_1(), _split(), _savings(), _checks(), *verdict(), _public()]
    return "\n\n".join("\n".join(lines) for lines in parts)


def _heading() -> list[str]:
    about = (
        f"GPU-hours of one epoch of {paper.PAIRS} pairs on {paper.NUM_GPUS} A100 80GB "
        f"({A100.flop / 1e12:.0f} TFLOP/s bfloat16, {A100.bandwidth / 1e12:.1f} TB/s), as SePO's "
        f"Table 1 has it. Assumed: products at {UTILISATION:.0%} of the rate, memory at "
        f"{BANDWIDTH_SHARE:.0%} of the bandwidth, prompts {paper.PROMPT_SHARE:.0%} of a mean "
        f"sequence, log-normal lengths with sigma {SPREAD:g}, nothing overlapped. At 100 %: FLOP that "
        "the model needs (no padding, nothing computed again) over the rate."
    )
    return ["Modelled, not measured", *wrap(about)]


def _table_1() -> list[str]:
    about = (
        "As the released code does it: padded rows, a pair at a time on each GPU, every logit, "
        f"checkpointing, ZeRO-3 by {A100.link / 1e9:.0f} GB/s (by PCIe: {PCIE.link / 1e9:.0f} GB/s)."
    )
    lines = [
        *wrap(about),
        f"{'':12}" + "".join(f"{model:>18}" for model in TABLE_1),
        f"{'':12}" + f"{'h (PCIe)':>12}{'100 %':>6}" * len(TABLE_1),
    ]
    for method in published.METHODS:
        cells = ""
        for model in TABLE_1:
            work = epoch(model, method, AS_RELEASED)
            found = f"{hours(work, A100):.1f} ({hours(work, PCIE):.1f})"
            cells += f"{found:>12}{hours_at_full_rate(work, A100):6.2f}"
        lines.append(f"{NAMES[method]:12}{cells}")
    for other in ("dpo", "simpo"):
        cells = ""
        for model in TABLE_1:
            sepo, base = (epoch(model, method, AS_RELEASED) for method in ("sepo", other))
            links, pcie = (hours(sepo, gpu) / hours(base, gpu) for gpu in (A100, PCIE))
            full = hours_at_full_rate(sepo, A100) / hours_at_full_rate(base, A100)
            cells += f"{f'{links:.2f} ({pcie:.2f})':>12}{full:6.2f}"
        lines.append(f"{'SePO/' + NAMES[other]:12}{cells}")
    return lines


def _split() -> list[str]:
    """Say what the hours are made of, each on top of those before it."""
    lines = [
        f"What {SPLIT}'s hours are made of, each line on top of the one before",
        f"{'':42}{'DPO':>8}{'SePO':>8}{'SePO/DPO':>10}{'of the rate':>13}  (SePO's)",
    ]
    works = [epoch(SPLIT, method, AS_RELEASED) for method in ("dpo", "sepo")]
    full = [hours_at_full_rate(work, A100) for work in works]

    def line(name: str, spent: list[float]) -> None:
        ratio, share = spent[1] / spent[0], full[1] / spent[1]
        cells = "".join(f"{x:8.2f}" for x in spent)
        lines.append(f"{name:42}{cells}{ratio:10.2f}{share:13.1%}")

    line("needed, at 100 %", full)
    split = [part_hours(work, A100) for work in works]
    spent = [sum(parts[name] for name in NEEDED) for parts in split]
    line(f"needed, at {UTILISATION:.0%} and through memory", spent)
    for name in EXTRA:
        if name in ("hidden scores", "offload"):  # flash attention skips the first
            continue
        spent = [hours + parts[name] for hours, parts in zip(spent, split, strict=True)]
        line(f"+ {name}", spent)
    pcie = [hours(work, PCIE) for work in works]
    line("the same by PCIe", pcie)
    host = replace(AS_RELEASED, host_optimiser=True, host_reference=True)
    moved = [hours(epoch(SPLIT, method, host), PCIE) for method in ("dpo", "sepo")]
    line("+ AdamW and DPO's reference on the host", moved)
    about = (
        f"(the host by {HOST_LINK / 1e9:.0f} GB/s, its memory {HOST_MEMORY / 1e9:.0f} GB/s; the "
        "scripts do not ask for it)"
    )
    return [*lines, *wrap(about)]


def _savings() -> list[str]:
    lines = ["This project's schedule, one saving a line, each on top of those before it"]
    for method, steps in SAVINGS.items():
        name = f"{NAMES[method]}, GPU-hours, gathered by {A100.link / 1e9:.0f} GB/s"
        lines += ["", f"{name:42}" + "".join(f"{model:>13}" for model in TABLE_1)]
        for what, schedule, cut in steps:
            works = [epoch(model, method, schedule, truncated=cut) for model in TABLE_1]
            lines.append(f"{what:42}" + _cells(works, A100))
        full = "".join(f"{hours_at_full_rate(work, A100):13.2f}" for work in works)
        lines.append(f"{'the last, at 100 %':42}{full}")
    return lines


def _checks() -> list[str]:
    about = (
        f"{SPLIT}, SePO's tokens through the layers' products alone at 100 %: "
        f"{paper.sepo_hours_at_full_rate(SPLIT):.2f} A100-hours (known: about 1.75). SePO/DPO by FLOP "
        f"alone: {paper.flop_ratio(SPLIT):.2f} (known: about 0.58; the paper measured 0.40). The "
        f"paper's hours are about {PAPER_RATE:.0%} of the rate."
    )
    return ["Against what is known of the paper", *wrap(about)]


def _public() -> list[str]:
    modelled = [f"{ZEPHYR.modelled(GPUS[name]):.1f} of an {name}" for name in ("A100", "H100")]
    shares = [f"{ZEPHYR.share_of_the_rate(GPUS[n]):.0%} of an {n}'s" for n in ("A100", "H100")]
    about = (
        f"{ZEPHYR.name}, DPO of {ZEPHYR.model} on the same {paper.PAIRS} pairs: {ZEPHYR.seconds:.0f} "
        f"s on {ZEPHYR.gpus} GPUs of 80 GB, {ZEPHYR.hours:.1f} GPU-hours, evaluations included. "
        f"Modelled: {', '.join(modelled)}. What the model needs fills {shares[0]} rate in that time, or "
        f"{shares[1]}; the paper's hours fill {PAPER_RATE:.0%}."
    )
    return ["Against a public run", *wrap(about)]


def _cells(works: list[Work], gpu: GPU) -> str:
    return "".join(f"{hours(work, gpu):13.2f}" for work in works)
