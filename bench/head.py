"""The head alone: selected_logprob against what it replaces, forward and backward.

    python bench/head.py                      # SmolLM2-135M's head, 468 of 2048 rows, on a CPU
    python bench/head.py --dtype bfloat16 --rows 64 --buffer 256 --vocab 8192

Compared: each schedule; a dense head on all N rows; a dense head on the M gathered rows; and the
bare matrix products the work cannot do without: 3 products of 2 M D V FLOP with a trainable
head, 2 with a frozen head, 1 without gradients, in the input's dtype. `ratio` is time over those. Rounds are interleaved, so that a
busy machine is busy for all; the median is reported. `extra` is the allocator's peak above the
inputs, gradients included. A result that is wrong is never timed.
"""

import argparse
import statistics
import time

import torch
from torch.profiler import ProfilerActivity, profile

from sepo.ops import explain_selected_logprob, selected_logprob


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}")
    print(
        f"N {args.buffer}, M {args.rows}, D {args.width}, V {args.vocab}, medians of {args.rounds}"
    )
    for name in args.dtype:
        report(getattr(torch, name), args)


def report(dtype: torch.dtype, args: argparse.Namespace) -> None:
    inputs = make_inputs(dtype, args)
    cases = make_cases(inputs, args)
    hidden, weight, *rest = inputs
    truth = train((hidden.double(), weight.double(), *rest), dense_gathered_double)
    for name, (call, _) in cases.items():
        gate(name, call(), truth, dtype)
    del truth
    seconds = {name: [] for name in cases}
    for _ in range(args.rounds):
        for name, (call, _) in cases.items():
            seconds[name].append(clock(call, args.device))
    bare = {c: statistics.median(seconds[f"bare products x{c}"]) for c in (1, 2, 3)}
    print(f"\n{dtype}\n{'':34}{'ms':>9}{'spread':>9}{'ratio':>8}{'extra MiB':>11}")
    for name, (call, products) in cases.items():
        middle = statistics.median(seconds[name])
        spread = (max(seconds[name]) - min(seconds[name])) / middle
        extra = peak_bytes(call, args.device) / 2**20
        print(
            f"{name:34}{middle * 1e3:9.1f}{spread:9.0%}{middle / bare[products]:8.2f}{extra:11.1f}"
        )


def make_inputs(dtype: torch.dtype, args: argparse.Namespace):
    """hidden (N, D), weight (V, D), rows (M,) int32, targets (M,), upstream (M,) float32."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(args.buffer, args.width, generator=g)
    weight = torch.randn(args.vocab, args.width, generator=g) / args.width**0.5
    rows = torch.randperm(args.buffer, generator=g)[: args.rows].sort().values.int()
    targets = torch.randint(args.vocab, (args.rows,), generator=g)
    upstream = torch.randn(args.rows, generator=g)
    place = lambda x: x.to(args.device)
    return (
        place(hidden).to(dtype), place(weight).to(dtype), place(rows), place(targets),
        place(upstream),
    )  # fmt: skip


def make_cases(inputs, args) -> dict:
    """name: (call, products it is measured against); a call returns (logp, dX, dW) or None."""
    hidden, weight, rows, targets, _ = inputs
    M, V = args.rows, args.vocab
    half = M * V * 2 * hidden.dtype.itemsize // 3  # less than saving takes: recompute, 2 chunks
    budget = {"recompute": half}
    cases = {f"bare products x{c}": (lambda c=c: products(inputs, c), c) for c in (1, 2, 3)}
    cases["dense, all rows"] = (lambda: train(inputs, dense_all), 3)
    cases["dense, gathered rows"] = (lambda: train(inputs, dense_gathered), 3)
    for name, leaves, count in (
        ("save", "both", 3), ("recompute", "both", 3), ("frozen_head", "hidden", 2),
        ("no_grad", "none", 1),
    ):  # fmt: skip
        size = budget.get(name, 4 << 30)
        fn = lambda *a, size=size, name=name: scheduled(name, size, *a)
        call = lambda fn=fn, leaves=leaves: train(inputs, fn, leaves)
        cases[f"selected_logprob, {name}"] = (call, count)
    return cases


def scheduled(name: str, budget: int, *args) -> torch.Tensor:
    assert explain_selected_logprob(*args, budget=budget).schedule == name
    return selected_logprob(*args, budget=budget)


def dense_all(hidden, weight, rows, targets) -> torch.Tensor:
    logp = (hidden @ weight.T).float().log_softmax(-1)  # (N, V)
    return logp[rows.long(), targets]


def dense_gathered(hidden, weight, rows, targets) -> torch.Tensor:
    logp = (hidden[rows] @ weight.T).float().log_softmax(-1)  # (M, V)
    return logp.gather(-1, targets[:, None])[:, 0]


def train(inputs, fn, leaves: str = "both"):
    """Forward and backward; gradients of both, of hidden, or of none."""
    hidden, weight, rows, targets, upstream = inputs
    h = hidden.detach().requires_grad_(leaves != "none")
    w = weight.detach().requires_grad_(leaves == "both")
    logp = fn(h, w, rows, targets)
    wanted = [x for x in (h, w) if x.requires_grad]
    grads = torch.autograd.grad(logp, wanted, upstream) if wanted else ()
    return logp.detach(), *grads


def products(inputs, count: int) -> None:
    """logits, then dX, then dW: the shapes of the work and nothing else."""
    hidden, weight, rows, *_ = inputs
    gathered = hidden[rows]
    logits = gathered @ weight.T
    if count > 1:
        logits @ weight
    if count > 2:
        logits.T @ gathered


def gate(name: str, result, truth, dtype: torch.dtype) -> None:
    """Stop unless logp and gradients agree with float64 as far as the dtype allows."""
    if result is None:
        return
    # plain PyTorch rounds its bfloat16 logits: only ours is held to 1e-4 nats
    exact = dtype == torch.float32 or name.startswith("selected")
    limits = (1e-4 if exact else 0.05, *(4 * torch.finfo(dtype).eps,) * 2)
    for what, got, true, limit in zip(("logp", "dX", "dW"), result, truth, limits, strict=False):
        error = (got.double() - true).abs().max()
        if what != "logp":
            error /= true.abs().max()
        if not error <= max(limit, 1e-5):
            raise SystemExit(f"{name}: {what} is off by {error:.2e}, limit {limit:.2e}: not timed")


def dense_gathered_double(hidden, weight, rows, targets) -> torch.Tensor:
    return (hidden[rows] @ weight.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def clock(call, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(call, device: str) -> int:
    """The allocator's peak above what is alive now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    events = prof.profiler.kineto_results.events()
    sizes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    alive = peak = 0
    for _, size in sorted(sizes, key=lambda pair: pair[0]):
        alive += size
        peak = max(peak, alive)
    return peak


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=468, help="M, rows selected")
    parser.add_argument("--buffer", type=int, default=2048, help="N, rows of the packed buffer")
    parser.add_argument("--width", type=int, default=576, help="D")
    parser.add_argument("--vocab", type=int, default=49152, help="V")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: leave as torch has it")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    return parser.parse_args()


if __name__ == "__main__":
    main()
