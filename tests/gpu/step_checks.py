"""What the GPU tests ask of memory, compilation, autocast and layers; functions of the device, too."""

from collections.abc import Callable

import torch
from gpu import head_checks as heads
from numerics import assert_as_accurate
from ops import kl_cases, logprob_cases
from tiny import random_scored_pairs, tiny_model

from bench.measure import peak_bytes
from sepo.data import pack
from sepo.data.segments import make_segments
from sepo.data.selection import Selection
from sepo.model.prepare import prepare_model
from sepo.ops import segment_mean, segment_topk, selected_logprob, selected_logprob_kl
from sepo_kernels.selected_logprob_kl.chunked import TILE_BYTES

# bytes: of the allocator's blocks, of sorting the rows, and of a workspace of cuBLASLt
OVERHEAD = {"cpu": 8 << 20, "cuda": 40 << 20}


def logprob_memory(impl, device, N, M, D, V, dtype, schedule):
    """Everything alive at once is the budget and tensors of widths N, M and V times D."""
    inputs, _ = heads.logprob_inputs(device, (N, M, D, V), dtype, "plain")
    budget = heads.logprob_budget(schedule, M, V, dtype)
    _bounded(budget, 16 * D * (N + M + V), N * V * dtype.itemsize, device, lambda: (
        logprob_cases.run(
            logprob_cases.checked(schedule, M), inputs, dtype=dtype, schedule=schedule,
            budget=budget, impl=impl,
        )
    ))  # fmt: skip


def kl_memory(impl, device, N, M, D, V, dtype, schedule):
    inputs, _ = heads.kl_inputs(device, (N, M, D, D, V), dtype, "plain")
    budget = heads.kl_budget(schedule, M, V, dtype)
    tiles = 6 * TILE_BYTES[device] if impl == "chunked" else 0
    _bounded(budget, 16 * D * (N + M + V) + tiles, 2 * N * V * dtype.itemsize, device, lambda: (
        kl_cases.run(
            kl_cases.checked(schedule, M), inputs, schedule=schedule, budget=budget, impl=impl,
        )
    ))  # fmt: skip


def _bounded(budget, others, dense, device, call):
    others += OVERHEAD[device]
    assert budget + others < dense, "the bound would not notice a tensor of all logits"
    call()  # workspaces and compiled kernels stay
    peak = peak_bytes(call, device)
    assert budget / 8 < peak <= budget + others, f"{peak} bytes, budget {budget} + {others}"


def step(impl, device, N=96, M=160, D=64, V=515):
    """A function of leaves, the leaves: a loss through both heads and the segment reductions."""
    i, _ = heads.kl_inputs(device, (N, M, D, D, V), torch.float32, "plain")
    cu = torch.tensor([0, M // 4, M // 4, M], dtype=torch.int32, device=device)

    def loss(hidden, weight):
        logp = selected_logprob(hidden, weight, i.rows, i.targets, impl=impl)
        again, _, kl = selected_logprob_kl(
            hidden * 1.5, weight, i.ref_hidden, i.ref_weight, i.rows, i.targets, impl=impl
        )
        score = segment_mean(logp, cu) - 0.1 * segment_mean(kl + again, cu)
        return torch.nn.functional.softplus(score).sum()

    return loss, (i.hidden.requires_grad_(), i.weight.requires_grad_())


def compiles(impl, device, backend):
    """One graph, of which the gradients are those of eager PyTorch."""
    torch._dynamo.reset()
    loss, leaves = step(impl, device)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=backend)(*leaves), leaves)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def autocast_changes_nothing(impl, device):
    """The inputs are used in the dtype they come in."""
    loss, leaves = step(impl, device)
    run = lambda: (value := loss(*leaves), *torch.autograd.grad(value, leaves))
    expected = run()
    with torch.autocast(device, torch.bfloat16):
        got = run()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def layers_agree(
    arch: str,
    fuse: Callable,  # of a prepared model
    device: str,
    dtype: torch.dtype | None = None,  # of autocast
) -> None:
    """Log-probabilities and gradients as near to float64's as those of the plain layers."""
    exact = tiny_model(arch, dtype=torch.float64)
    exact.load_state_dict(tiny_model(arch).state_dict())  # another dtype draws other weights
    truth = layer_step(prepare_model(exact).train())
    plain = layer_step(prepare_model(tiny_model(arch).to(device)).train(), dtype)
    model = prepare_model(tiny_model(arch).to(device))
    fuse(model)
    ours = layer_step(prepare_model(model).train(), dtype)
    assert any(not torch.equal(ours[name], value) for name, value in plain.items()), "not fused"
    for name, value in truth.items():
        assert_as_accurate(ours[name].cpu(), plain[name].cpu(), value, what=name, factor=3)


def layer_step(model, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Log-probabilities of a small packed batch and their mean's gradients."""
    device = model.device
    batch = pack([make_segments(pair, Selection("all")) for pair in random_scored_pairs(3)]).to(
        device
    )
    model.zero_grad()
    enabled = dtype is not None
    with torch.autocast(device.type, dtype or torch.bfloat16, enabled=enabled):
        logp = model(batch=batch)
    logp.mean().backward()
    return {"logp": logp.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}


def calls(impl, device):
    """Every operation of a step, forward and backward, by name; none of them may wait."""
    shape, dtype = (96, 160, 64, 1003), torch.bfloat16
    inputs, options = heads.logprob_inputs(device, shape, dtype, "all")
    kls, _ = heads.kl_inputs(device, (*shape[:3], 48, shape[3]), dtype, "all")
    M, V = shape[1], shape[3]
    found = {}
    for schedule in heads.LOGPROB_SCHEDULES:
        budget = heads.logprob_budget(schedule, M, V, dtype, options["softcap"])
        found[f"logprob {schedule}"] = lambda s=schedule, b=budget: logprob_cases.run(
            logprob_cases.checked(s, M), inputs, dtype=dtype, schedule=s, budget=b, impl=impl,
            **options,
        )  # fmt: skip
    for schedule in heads.KL_SCHEDULES:
        budget = heads.kl_budget(schedule, M, V, dtype)
        for direction in kl_cases.DIRECTIONS:
            found[f"kl {schedule} {direction}"] = (
                lambda s=schedule, b=budget, d=direction: kl_cases.run(
                    kl_cases.checked(s, M), kls, schedule=s, budget=b, direction=d, impl=impl,
                    **options,
                )
            )  # fmt: skip
    return found


def segment_calls(device):
    """The operations over segments; cu_tokens is on the CPU, as the packer made it."""
    g = torch.Generator().manual_seed(0)
    cu_tokens = torch.tensor([0, 40, 40, 1000, 4001], dtype=torch.int32)
    score = torch.randn(4001, generator=g).to(device)
    cu_rows = torch.tensor([0, 10, 10, 4001], dtype=torch.int32, device=device)
    values = score.clone().requires_grad_()
    up = torch.ones(3, device=device)
    found = {
        f"topk {impl}": lambda i=impl: segment_topk(score, cu_tokens, 0.3, "alternate", impl=i)
        for impl in ("native", "sorting")
    }
    found["mean"] = lambda: torch.autograd.grad(segment_mean(values, cu_rows), values, up)
    return found
