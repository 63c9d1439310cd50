"""Where the GPU's time goes in a step of sepo, and when it has nothing to do: a profile in words.

    python tools/leg/trace.py [--model llama-1b-shape] [--pairs 16]

The trace itself, for a viewer, is runs/bench/step-trace.json.gz.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run as a program: its own folder is no place to import from
    sys.path[:1] = [str(ROOT), str(ROOT / "python")]

GAP = 50_000  # ns in which the GPU waits for Python
KINDS = {  # the first that fits
    "copies from pageable memory": "Pageable -> Device",
    "copies": "Memcpy|Memset",
    "matrix products": "gemm|nvjet|cutlass_.*(mma|tensorop)|splitK",
    "attention": "flash|fmha|sdpa|triton_tem",
    "elementwise": "elementwise|triton_poi|CatArray|index|copy_kernel|cast",
    "reductions": "reduce|triton_(red|per)|norm",
}
STEPS = 2

Event = tuple[str, int, int]  # what the device did: name, start and duration in ns


def digest(events: Iterable[Event]) -> list[str]:
    """Lines: share and number of each kind of kernel, gaps, and the longest of what fits nothing."""
    events = sorted(events, key=lambda event: event[1])
    if not events:
        return ["the device did nothing"]
    totals: dict[str, list[int]] = {kind: [] for kind in (*KINDS, "others")}
    others: dict[str, int] = {}
    gaps, end = [], events[0][1]
    for name, start, duration in events:
        kind = next((kind for kind, words in KINDS.items() if re.search(words, name)), "others")
        totals[kind].append(duration)
        if kind == "others":
            others[name] = others.get(name, 0) + duration
        if start - end > GAP:
            gaps.append(start - end)
        end = max(end, start + duration)
    span = end - events[0][1]
    lines = [f"{span / 1e6:10.2f} ms from the first to the last"]
    lines += [
        f"{sum(times) / 1e6:10.2f} ms {sum(times) / span:6.1%}  {len(times):6} {kind}"
        for kind, times in totals.items()
    ]
    lines.append(
        f"{sum(gaps) / 1e6:10.2f} ms {sum(gaps) / span:6.1%}  {len(gaps):6} gaps over 50 µs"
    )
    longest = sorted(others.items(), key=lambda item: -item[1])[:5]
    return lines + [f"{time / 1e6:10.2f} ms         {name[:90]}" for name, time in longest]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="llama-1b-shape")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    args = parser.parse_args(argv)
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    step = one_step(args.model, args.pairs, args.device)
    step()
    step()  # the second finds everything compiled and reserved
    on_gpu = args.device == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as prof:
        for _ in range(STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    found = [
        (event.name(), event.start_ns(), event.duration_ns())
        for event in prof.profiler.kineto_results.events()
        if event.device_type() == (DeviceType.CUDA if on_gpu else DeviceType.CPU)
    ]
    print(f"{STEPS} steps of {args.pairs} pairs, {args.model}")
    print("\n".join(digest(found)))
    path = ROOT / "runs" / "bench" / "step-trace.json.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    prof.export_chrome_trace(str(path))
    return 0


def one_step(name: str, count: int, device: str):
    """A function: a SePO step of drawn pairs, with clipping and AdamW."""
    from bench.steps import case, models, ours, pairs
    from bench.steps.objectives import SETTINGS

    case.be_quiet()
    weights = models.Weights(models.load(name, device)[0])
    drawn = pairs.drawn_pairs(count, weights.model.config.vocab_size, 512)
    rounds = pairs.deal([pairs.with_scores(pair) for pair in drawn], 1, count)
    bf16 = device == "cuda"
    contender = ours.contender("sepo", "sepo", weights, rounds, SETTINGS["sepo"], bf16=bf16)
    contender.lower()

    def step() -> None:
        contender.run(1)
        weights.finish()

    return step


if __name__ == "__main__":
    sys.exit(main())
