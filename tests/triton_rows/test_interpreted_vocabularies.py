"""Every row kernel on rows as long as real vocabularies, by the interpreter, against float64.

Each row is another hard case, and the buffers are as the loops hand them over: rows padded to whole
cache lines, here with NaN, which no kernel may read, and which none may overwrite.
"""

import pytest
import torch
from torch import Tensor

from sepo_kernels import triton_kl, triton_kl_dlogits, triton_logprob
from sepo_kernels.triton_rows import launch, scale_arguments

# NumPy's, of rows that are done again: e^200 of a hopeless target, and what comes of it
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered"),
    pytest.mark.filterwarnings("ignore:invalid value"),
    pytest.mark.slow,
]
DIRECTIONS = ["ref||policy", "policy||ref"]
TILE = 8192  # columns: fewer tiles for the interpreter, where V is large
FINITE_ROWS = slice(0, 7)  # the last row's target is no column
VOCABULARIES = [32001, 50257, 151669, 262144]
OPTIONS = {
    "plain": dict(bias=False, scale=1.0, softcap=None),
    "bias": dict(bias=True, scale=1.0, softcap=None),
    "all": dict(bias=True, scale=0.7, softcap=30.0),
}
CASES = [*((V, "plain") for V in VOCABULARIES), (32001, "bias"), (50257, "all")]
DTYPES = [torch.float32, torch.float16]
BOTH = [(*case, DTYPES[i % 2]) for i, case in enumerate(CASES)] + [(*CASES[-1], DTYPES[0])]


@pytest.fixture(autouse=True)
def wide(tile):
    tile(TILE)


def rows_of(V: int, options: dict, seed: int = 0):
    """logits (8, V), bias (V,) or None, targets (8,): the target of each row is a case."""
    g = torch.Generator().manual_seed(seed)
    tail = (V - 1) // TILE * TILE
    targets = torch.tensor([0, V - 1, tail, 1000, 77, V - 2, 4096, V])
    z = padded(8, V)
    z.copy_(torch.randn(8, V, generator=g) * 3)
    bias = None
    if options["bias"]:
        bias = torch.randn(V, generator=g)
        bias[8000:17000] = bias[V - 40 : V - 10] = -torch.inf  # over a whole tile, and at the end
    at = lambda row: (row, int(targets[row]))
    z[at(3)] = z[at(1)] = 60.0  # confident, in the middle and in the last column
    if options["softcap"] is None:
        z[4, 5] = z[at(4)] + 200  # hopeless
        z[5, 4095] = z[at(5)] + 38  # nearly
        z[6, 3] = z[at(6)] + 45  # just
    return z, bias, targets


def padded(rows: int, V: int, dtype=torch.float32) -> Tensor:
    """(rows, V) of NaN, every row from the beginning of a cache line of 128 bytes."""
    line = 128 // dtype.itemsize
    return torch.full((rows, -(-V // line) * line), torch.nan, dtype=dtype)[:, :V]


def assert_padding_untouched(*blocks: Tensor):
    for block in blocks:
        whole = block.as_strided((block.shape[0], block.stride(0)), (block.stride(0), 1))
        assert whole[:, block.shape[1] :].isnan().all()


def finished(z: Tensor, bias, options) -> tuple[Tensor, Tensor]:  # logits, cap', in float64
    z = z.double() * options["scale"]
    if bias is not None:
        z = z + bias.double()
    if options["softcap"] is None:
        return z, torch.ones_like(z)
    relative = (z / options["softcap"]).tanh()
    return options["softcap"] * relative, 1 - relative**2


def dlogits_of(logits: Tensor, derivative: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logp (rows,), NaN where the target is none, and -dlogp/dz."""
    log_p = logits.log_softmax(-1)
    ok = targets < logits.shape[1]
    at = targets.where(ok, 0)[:, None]
    others = log_p.exp().scatter(-1, at, 0).sum(-1)
    logp = log_p.gather(-1, at)[:, 0]
    # the float64 softmax has lost the digits of 1 - p too
    logp = torch.where(others < 0.5, (-others).log1p(), logp)
    p = log_p.exp()
    dlogits = torch.where(ok[:, None], p.scatter(-1, at, logp.expm1()[:, None]), p)
    return logp.where(ok, torch.nan), dlogits * derivative


def arguments(bias, z) -> tuple:  # as a kernel wants them: a tensor, and whether to read it
    return z if bias is None else bias, int(bias is not None)


def sums(z, bias, targets, options, to=None):
    logp, lse, reference, row_scale = torch.full((4, z.shape[0]), torch.nan)
    bias_or_any, has_bias = arguments(bias, z)
    out = z if to is None else to
    launch(
        triton_logprob.logprob_row, z.shape[0], None,
        z, bias_or_any, targets, logp, lse, reference, row_scale, out, z.stride(0), out.stride(0),
        z.shape[1], has_bias, *scale_arguments(options["scale"], z), options["softcap"] or 0.0,
        CAPPED=options["softcap"] is not None, WRITE_DLOGITS=to is not None,
    )  # fmt: skip
    return logp, lse, reference, row_scale


@pytest.mark.parametrize(("V", "name"), CASES)
def test_one_pass(V, name):
    options = OPTIONS[name]
    z, bias, targets = rows_of(V, options)
    logits, derivative = finished(z, bias, options)
    wanted, dlogits = dlogits_of(logits, derivative, targets)
    to = padded(8, V)
    logp, lse, reference, row_scale = sums(z, bias, targets, options, to)
    check_numbers(logp, lse, wanted, logits)
    ok = targets < V
    at = targets.where(ok, 0)[:, None]
    if name == "plain":  # hopeless targets are none's reference
        same = reference == z.gather(-1, at)[:, 0]
        assert same.tolist() == [True, True, True, True, False, True, False, False]
    # also the target's entry, of which a confident row keeps every digit
    torch.testing.assert_close(to.double() * row_scale[:, None], dlogits, rtol=2e-5, atol=1e-30)
    assert_padding_untouched(to, z)


@pytest.mark.parametrize(("V", "name", "dtype"), BOTH, ids=str)
def test_two_passes(V, name, dtype):
    """float32 in the logits' place; float16, with what it has of range."""
    options = OPTIONS[name]
    z, bias, targets = rows_of(V, options)
    logits, derivative = finished(z, bias, options)
    wanted, dlogits = dlogits_of(logits, derivative, targets)
    logp, lse, reference, row_scale = sums(z, bias, targets, options)
    check_numbers(logp, lse, wanted, logits)
    bias_or_any, has_bias = arguments(bias, z)
    to = z if dtype == torch.float32 else padded(8, V, dtype)
    launch(
        triton_logprob.logprob_dlogits, 8, V,
        z, bias_or_any, targets, logp, reference, row_scale, to, z.stride(0), to.stride(0), V,
        has_bias, *scale_arguments(options["scale"], z), options["softcap"] or 0.0,
        CAPPED=options["softcap"] is not None,
    )  # fmt: skip
    least = 1e-30 if dtype == torch.float32 else 2**-24
    rtol = 2e-5 if dtype == torch.float32 else 2**-10
    torch.testing.assert_close(to.double(), dlogits, rtol=rtol, atol=least)
    assert_padding_untouched(to, z)


def check_numbers(logp, lse, wanted, logits):
    assert torch.equal(logp.isnan(), wanted.isnan()) and bool(wanted[-1].isnan())
    torch.testing.assert_close(logp.double(), wanted, rtol=2e-6, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-6, atol=1e-6)


def two_rows(V: int, options: dict):
    """Two heads' rows: the reference is near the policy's in rows 0 to 3, and another beyond."""
    z, bias, targets = rows_of(V, options)
    other, ref_bias, _ = rows_of(V, options, seed=1)
    ref_z = padded(8, V)
    ref_z.copy_(other)
    near = torch.randn(4, V, generator=torch.Generator().manual_seed(2)) * 1e-2
    ref_z[:4] = z[:4] + near
    if options["softcap"] is None:  # hopeless for the policy alone
        ref_z[4, 5], ref_z[4, targets[4]] = 0.0, 60.0
    if bias is not None:
        ref_bias = bias + 1e-2
    return z, ref_z, bias, ref_bias, targets


def kl_truth(z, ref_z, bias, ref_bias, targets, options, direction):
    """logp, ref_logp, kl (8,), first and second dlogits (8, V), l = log q - log p, max(p, q)."""
    a, derivative = finished(z, bias, options)
    b, _ = finished(ref_z, ref_bias, options)
    logp, first = dlogits_of(a, derivative, targets)
    ref_logp, _ = dlogits_of(b, derivative, targets)
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    ratio = torch.where(torch.maximum(p, q) > 0, log_q - log_p, 0)
    if direction == "policy||ref":
        kl = -(p * ratio).sum(-1)
        second = -p * (ratio + kl[:, None])
    else:
        kl = (q * ratio).sum(-1)
        second = p - q
    return logp, ref_logp, kl, first, second * derivative, ratio, torch.maximum(p, q)


def settings(options, logits: Tensor) -> tuple:
    """Scale and soft cap of both heads, as the kernels take them."""
    return (*scale_arguments(options["scale"], logits), options["softcap"] or 0.0) * 2


def kl_row(z, ref_z, bias, ref_bias, targets, options, direction, kept=None):
    logp, ref_logp, kl = torch.full((3, 8), torch.nan)
    state = torch.full((8, triton_kl.NUM_STATE.value), torch.nan)
    (b, has_bias), (ref_b, has_ref_bias) = (
        arguments(bias, z),
        arguments(ref_bias, z),
    )
    first, second = kept or (z, ref_z)
    launch(
        triton_kl.kl_row, 8, None,
        z, ref_z, b, ref_b, targets, logp, ref_logp, kl, state, first, second, z.stride(0),
        ref_z.stride(0), first.stride(0), second.stride(0), z.shape[1], has_bias, has_ref_bias,
        *settings(options, z), CAPPED=options["softcap"] is not None,
        POLICY_FIRST=direction == "policy||ref", WRITE_BLOCKS=kept is not None,
    )  # fmt: skip
    return logp, ref_logp, kl, state


def check_kl_numbers(found, truth):
    for value, wanted in zip(found[:2], truth[:2], strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=2e-6, atol=1e-12, equal_nan=True)
    # a sum of what is relative to the target's own log-ratio, which has to cancel
    own = (truth[1] - truth[0]).abs().nan_to_num(10.0)
    # whose exponents are rounded where the target is far below
    far = -torch.minimum(truth[0], truth[1]).nan_to_num(0.0).clamp(-60)
    error = (found[2].double() - truth[2]).abs()
    assert (error <= 1e-5 * truth[2] + 1e-6 * (1 + own) + 2**-23 * far).all(), error


KL_CASES = [(*case, DIRECTIONS[i % 2]) for i, case in enumerate(CASES)]
KL_CASES.append((*CASES[-1], DIRECTIONS[0]))
KL_BOTH = [(*case, DTYPES[i // 2 % 2]) for i, case in enumerate(KL_CASES)]


@pytest.mark.parametrize(("V", "name", "direction"), KL_CASES)
def test_kl_in_one_pass(V, name, direction):
    """And again from its state, and the gradient from what is kept, in two parts of the columns."""
    options = OPTIONS[name]
    inputs = two_rows(V, options)
    z, ref_z, bias, ref_bias, targets = inputs
    truth = kl_truth(*inputs, options, direction)
    *_, first, second, ratio, larger = truth
    kept = padded(8, V), padded(8, V, torch.float16)
    found = kl_row(*inputs, options, direction, kept)
    check_kl_numbers(found, truth)
    logp, _, kl, state = found

    repeated = padded(8, V), padded(8, V, torch.float16)
    (b, has_bias), (ref_b, has_ref_bias) = (
        arguments(bias, z),
        arguments(ref_bias, z),
    )
    launch(
        triton_kl.kl_ratios, 8, V,
        z, ref_z, b, ref_b, state, *repeated, z.stride(0), ref_z.stride(0), repeated[0].stride(0),
        repeated[1].stride(0), V, has_bias, has_ref_bias, *settings(options, z),
        CAPPED=options["softcap"] is not None,
    )  # fmt: skip
    for before, after in zip(kept, repeated, strict=True):
        assert torch.equal(before, after)
        assert_padding_untouched(before, after)

    grad_logp, grad_kl = torch.randn(2, 8, generator=torch.Generator().manual_seed(3))
    out = padded(8, V)
    middle = V // 2 // 64 * 64
    for c in (slice(0, middle), slice(middle, V)):
        parts = kept[0][:, c], kept[1][:, c], out[:, c]
        launch(
            triton_kl.kl_combine_ratios, 8, c.stop - c.start,
            *parts[:2], targets, logp, kl, state, grad_logp, grad_kl, parts[2],
            *(part.stride(0) for part in parts), c.start, c.stop - c.start,
            POLICY_FIRST=direction == "policy||ref",
        )  # fmt: skip
    wanted = grad_kl[:, None] * second - grad_logp[:, None] * first
    # what float16 leaves of l, which is kept relative to the target's, and which tells a's cap
    digits = (ratio.abs() + (truth[1] - truth[0]).abs()[:, None]) * larger
    slope = 1.0  # of p (l + KL), in which l makes p too where q is the larger
    if direction == "policy||ref":
        slope = 1 + (-ratio.clamp(min=0)).exp() * (ratio + truth[2][:, None]).abs()
    digits *= grad_kl.abs()[:, None] * slope + grad_logp.abs()[:, None] * (name == "all")
    size = larger * (grad_kl.abs() * (1 + truth[2]))[:, None] + (first * grad_logp[:, None]).abs()
    error = (out.double() - wanted).abs()
    assert (error <= 2**-11 * digits + 2e-5 * size + 1e-12)[FINITE_ROWS].all()
    assert_padding_untouched(out)


@pytest.mark.parametrize(("V", "name", "direction", "dtype"), KL_BOTH, ids=str)
def test_kl_in_two_passes(V, name, direction, dtype):
    options = OPTIONS[name]
    inputs = two_rows(V, options)
    z, ref_z, bias, ref_bias, targets = inputs
    truth = kl_truth(*inputs, options, direction)
    _, _, _, first, second, ratio, larger = truth
    found = kl_row(*inputs, options, direction)
    check_kl_numbers(found, truth)
    logp, _, kl, state = found
    to = (z, ref_z) if dtype == torch.float32 else (padded(8, V, dtype), padded(8, V, dtype))
    (b, has_bias), (ref_b, has_ref_bias) = (
        arguments(bias, z),
        arguments(ref_bias, z),
    )
    launch(
        triton_kl_dlogits.kl_dlogits, 8, V,
        z, ref_z, b, ref_b, targets, logp, kl, state, *to, z.stride(0), ref_z.stride(0),
        to[0].stride(0), to[1].stride(0), V, has_bias, has_ref_bias, *settings(options, z),
        CAPPED=options["softcap"] is not None, POLICY_FIRST=direction == "policy||ref",
    )  # fmt: skip
    rtol, least = (2e-5, 1e-12) if dtype == torch.float32 else (2**-10, 2**-23)
    torch.testing.assert_close(
        to[0][FINITE_ROWS].double(), first[FINITE_ROWS], rtol=rtol, atol=least
    )
    size = larger * (1 + ratio.abs() + truth[2][:, None])
    error = (to[1].double() - second).abs()
    assert (error <= rtol * second.abs() + 2e-5 * size + least)[FINITE_ROWS].all()
    assert_padding_untouched(*to)
    grad_logp, grad_kl = torch.randn(2, 8, generator=torch.Generator().manual_seed(3))
    out = padded(8, V, dtype)
    launch(
        triton_kl_dlogits.kl_combine, 8, V,
        *to, grad_logp, grad_kl, out, to[0].stride(0), to[1].stride(0), out.stride(0), V,
    )  # fmt: skip
    wanted = grad_kl[:, None] * to[1].float() - grad_logp[:, None] * to[0].float()
    torch.testing.assert_close(out.float(), wanted, rtol=rtol, atol=least)
    assert_padding_untouched(out)
