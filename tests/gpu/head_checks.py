"""What the GPU tests ask of the two heads, as functions of implementation, device and shape.

So a CPU can rehearse them: a typo is found there, and not on the day a GPU is at hand.
"""

import math
from functools import lru_cache

import torch
from numerics import assert_as_accurate, max_error
from ops import k_target_cases, kl_cases, logprob_cases

from sepo.ops import (
    explain_selected_logprob,
    explain_selected_logprob_kl,
    selected_logprob,
    selected_logprob_kl,
)
from sepo_kernels.schedules import SAVE_MIN_CHUNK, save_bytes
from sepo_kernels.selected_logprob import reference as one_head
from sepo_kernels.selected_logprob.layout import HeadLayout
from sepo_kernels.selected_logprob_kl import reference as two_heads
from sepo_kernels.selected_logprob_kl.layout import TwoHeadLayout

LOGPROB_SCHEDULES = logprob_cases.SCHEDULES
KL_SCHEDULES = list(kl_cases.SCHEDULES)
NATS = {"logp", "ref_logp", "kl"}  # the others are gradients
CHUNK = 20  # rows that the small budget has room for
MULTIPROCESSORS = 1  # any: rows are padded, which no CPU does and which its rehearsal has room for
# times plain PyTorch's error. In float32 both are a few roundings, and of hundreds of comparisons
# some are several times luckier than others; a product in TF32 would be a thousand times
FACTOR = {torch.float32: 6.0, torch.float16: 2.0, torch.bfloat16: 2.0}


def logprob(impl, device, shape, dtype, variant):
    """selected_logprob in all its schedules, values and gradients, against float64."""
    inputs, truth, plain, options = _logprob_truth(device, shape, dtype, variant)
    M, V = shape[1], shape[-1]
    for schedule in LOGPROB_SCHEDULES:
        budget = logprob_budget(schedule, M, V, dtype, options.get("softcap"))
        ours = logprob_cases.run(
            logprob_cases.checked(schedule, M), inputs, dtype=dtype, schedule=schedule,
            budget=budget, impl=impl, **options,
        )  # fmt: skip
        _compare(ours, plain, truth, dtype, f"{impl}, {schedule}")


def kl(impl, device, shape, dtype, variant, direction):
    """selected_logprob_kl in all its schedules, values and gradients, against float64."""
    inputs, truth, plain, options = _kl_truth(device, shape, dtype, variant, direction)
    M, V = shape[1], shape[-1]
    for schedule in KL_SCHEDULES:
        ours = kl_cases.run(
            kl_cases.checked(schedule, M), inputs, schedule=schedule,
            budget=kl_budget(schedule, M, V, dtype), impl=impl, **options,
        )  # fmt: skip
        _compare(ours, plain, truth, dtype, f"{impl}, {schedule}, {direction}")


def k_targets(impl, device, shape, dtype, over):
    """selected_logprob with K targets a row, absent and repeated ones too, against float64."""
    options = dict(logprob_cases.VARIANTS["all"])
    inputs = k_target_cases.make_inputs(*shape, dtype=dtype, bias=options.pop("bias"))
    inputs = [x if x is None else x.to(device) for x in inputs]
    run = lambda fn, d, **more: k_target_cases.run(
        fn, inputs, dtype=d, over=over, **options, **more
    )
    plain, truth = (run(k_target_cases.dense, d) for d in (dtype, torch.float64))
    ours = run(selected_logprob, dtype, impl=impl)
    _compare(ours, plain, truth, dtype, f"{impl}, K targets over the {over}")


# the implementations come in turn, and the truth of the largest shape is not made for each
@lru_cache(maxsize=1)
def _logprob_truth(device, shape, dtype, variant):
    inputs, options = logprob_inputs(device, shape, dtype, variant)
    run = lambda d: logprob_cases.run(one_head.selected_logprob, inputs, dtype=d, **options)
    return inputs, run(torch.float64), run(dtype), options


@lru_cache(maxsize=1)
def _kl_truth(device, shape, dtype, variant, direction):
    inputs, options = kl_inputs(device, shape, dtype, variant)
    options["direction"] = direction
    run = lambda d: kl_cases.run(two_heads.selected_logprob_kl, inputs, dtype=d, **options)
    return inputs, run(torch.float64), run(dtype), options


def logprob_inputs(device, shape, dtype, variant):
    """Inputs as logprob_cases.run wants them, on `device`, and the options of the call."""
    options = dict(logprob_cases.VARIANTS[variant])
    inputs = logprob_cases.make_inputs(*shape, dtype=dtype, bias=options.pop("bias"))
    return [x if x is None else x.to(device) for x in inputs], options


def kl_inputs(device, shape, dtype, variant):
    """Inputs as kl_cases.run wants them, on `device`, and the options of the call."""
    options = dict(kl_cases.VARIANTS[variant])
    inputs = kl_cases.make_inputs(*shape, dtype=dtype, bias=options.pop("bias"))
    return kl_cases.Inputs(*(x if x is None else x.to(device) for x in inputs)), options


def logprob_budget(schedule, M, V, dtype, softcap=None) -> int:
    """The least that `save` does with, or room for CHUNK rows."""
    layout = HeadLayout(V, dtype, softcap is not None, False, MULTIPROCESSORS)
    if schedule == "save":
        return M * layout.saved_bytes + max(1, min(M, SAVE_MIN_CHUNK)) * layout.row_bytes(
            gradient=True
        )
    return CHUNK * layout.row_bytes(gradient=schedule != "no_grad")


def kl_budget(schedule, M, V, dtype) -> int:
    """The least that `save` does with, or room for CHUNK rows."""
    layout = TwoHeadLayout(V, dtype, dtype, False, MULTIPROCESSORS)
    row = layout.row_bytes(gradient=schedule != "no_grad")
    return max(row, save_bytes(M, layout)) if schedule.startswith("save") else CHUNK * row


def _compare(ours, plain, truth, dtype, what):
    for name, value in ours.items():
        if dtype == torch.float64:
            message = lambda text, name=name: f"{what}, {name}: {text}"
            torch.testing.assert_close(value, truth[name], rtol=1e-10, atol=1e-11, msg=message)
            continue
        about = dict(what=f"{what}, {name}", factor=FACTOR[dtype])
        assert_as_accurate(value, plain[name], truth[name], **about)
        if name in NATS:  # log-sum-exps of logits that were never rounded
            assert value.dtype == torch.float32
            error = max_error(value, truth[name])
            assert error <= 1e-4, f"{what}, {name}: off by {error:.1e} nats"


def nats_of_confident_and_unlikely_rows(impl, device, M, D, V, dtype):
    """Every other hidden state is made from its target's weight: logp about -1e-4, else -log V."""
    g = torch.Generator(device).manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=g, device=device)
    targets = torch.randint(V, (M,), generator=g, device=device)
    weight = (normal(V, D) / D**0.5).to(dtype)
    hidden, toward = normal(M, D), weight[targets[::2]].float()
    hidden[::2] = toward / toward.square().sum(-1, True) * (math.log(V) + 9)
    ref_hidden = (hidden + 0.1 * normal(M, D)).to(dtype)
    ref_weight = (weight + 0.1 / D**0.5 * normal(V, D)).to(dtype)
    hidden, rows = hidden.to(dtype), torch.arange(M, device=device, dtype=torch.int32)

    heads = hidden, weight, ref_hidden, ref_weight
    exact = [x.double() for x in heads]
    for direction in kl_cases.DIRECTIONS:
        truth = two_heads.selected_logprob_kl(*exact, rows, targets, direction=direction)
        assert (truth[0][::2] > -0.01).all() and (truth[0][1::2] < -2).all()
        ours = selected_logprob_kl(*heads, rows, targets, direction=direction, impl=impl)
        errors = [max_error(a, b) for a, b in zip(ours, truth, strict=True)]
        assert max(errors) <= 1e-4, f"{direction}: logp, ref_logp, kl off by {errors}"
    logp = selected_logprob(hidden, weight, rows, targets, impl=impl)
    assert max_error(logp, truth[0]) <= 1e-4


def rows_far_into_the_logits(impl, device, M, D, V, ends):
    """All M rows in one chunk; the first and last `ends` of them alone have a gradient."""
    hidden, weight, _, _, targets, _ = logprob_inputs(
        device, (M, M, D, V), torch.bfloat16, "plain"
    )[0]
    rows = torch.arange(M, device=device, dtype=torch.int32)
    upstream = torch.zeros(M, device=device)
    upstream[:ends], upstream[-ends:] = 1, -2
    some = torch.cat([rows[:ends], rows[-ends:]])
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    budget = M * HeadLayout(V, hidden.dtype, False, False, MULTIPROCESSORS).row_bytes(gradient=True)
    args = hidden, weight, rows, targets
    told = explain_selected_logprob(*args, budget=budget, impl=impl)
    assert (told.schedule, told.fwd_chunk) == ("save", M)
    logp = selected_logprob(*args, budget=budget, impl=impl)
    grads = torch.autograd.grad(logp, (hidden, weight), upstream)
    reference = lambda h, w, r: (one_head.selected_logprob(h, w, r, targets[r]),)
    _compare_ends((logp,), grads, reference, hidden, weight, some, (upstream,))


def kl_rows_far_into_the_logits(impl, device, M, D, V, ends):
    """As rows_far_into_the_logits, with two heads."""
    i, _ = kl_inputs(device, (M, M, D, D, V), torch.bfloat16, "plain")
    rows = torch.arange(M, device=device, dtype=torch.int32)
    upstream = torch.zeros(M, device=device)
    upstream[:ends], upstream[-ends:] = 1, -2
    some = torch.cat([rows[:ends], rows[-ends:]])
    layout = TwoHeadLayout(V, torch.bfloat16, torch.bfloat16, False, MULTIPROCESSORS)
    budget = M * (layout.saved_bytes + layout.scratch_bytes)
    hidden, weight = i.hidden.requires_grad_(), i.weight.requires_grad_()
    call = lambda fn: fn(
        hidden, weight, i.ref_hidden, i.ref_weight, rows, i.targets,
        direction="policy||ref", budget=budget, impl=impl,
    )  # fmt: skip
    told = call(explain_selected_logprob_kl)
    assert (told.schedule, told.fwd_chunk) == ("save", M)
    logp, ref_logp, kl = call(selected_logprob_kl)
    grads = torch.autograd.grad((logp, kl), (hidden, weight), (upstream, upstream))
    reference = lambda h, w, r: two_heads.selected_logprob_kl(
        h, w, i.ref_hidden.to(h.dtype), i.ref_weight.to(h.dtype), r, i.targets[r],
        direction="policy||ref",
    )  # fmt: skip
    none = torch.zeros_like(upstream)
    _compare_ends((logp, ref_logp, kl), grads, reference, hidden, weight, some,
                  (upstream, none, upstream))  # fmt: skip


def _compare_ends(values, grads, reference, hidden, weight, some, upstream):
    def of_definition(dtype):
        h, w = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
        found = reference(h, w, some)
        total = sum((x * u[some]).sum() for x, u in zip(found, upstream, strict=True))
        return [x.detach() for x in found], torch.autograd.grad(total, (h, w))

    (true_values, true_grads), (_, plain_grads) = map(of_definition, (torch.float64, hidden.dtype))
    for value, true in zip(values, true_values, strict=True):
        assert torch.isfinite(value).all()
        assert max_error(value[some], true) <= 1e-4
    for name, ours, plain, true in zip(
        ("hidden", "weight"), grads, plain_grads, true_grads, strict=True
    ):
        assert_as_accurate(ours, plain, true, what=name)
    others = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
    others[some] = False
    assert (grads[0][others] == 0).all()  # without a gradient, and nobody else's is written there


def repeatable(impl, device, N, M, D, V, dtype):
    """The same bits twice, where many rows and targets repeat."""
    inputs, options = logprob_inputs(device, (N, M, D, V), dtype, "all")
    kls, _ = kl_inputs(device, (N, M, D, D, V), dtype, "all")
    for schedule in LOGPROB_SCHEDULES:
        budget = logprob_budget(schedule, M, V, dtype, options["softcap"])
        _twice(schedule, lambda s=schedule, b=budget: logprob_cases.run(
            selected_logprob, inputs, dtype=dtype, schedule=s, budget=b, impl=impl, **options,
        ))  # fmt: skip
    for schedule in KL_SCHEDULES:
        budget = kl_budget(schedule, M, V, dtype)
        _twice(schedule, lambda s=schedule, b=budget: kl_cases.run(
            selected_logprob_kl, kls, schedule=s, budget=b, impl=impl, **options,
        ))  # fmt: skip


def _twice(what, call):
    first, second = call(), call()
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{what}, {name}"
