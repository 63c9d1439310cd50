"""The native CPU attention against its definition: one softmax a query over the keys it may see."""

from functools import cache

import pytest
import torch
from plain_attention import plain, visible_rows
from torch import Tensor

from sepo.attention import native, sdpa
from sepo.attention.terms import Span, Terms
from sepo_kernels import extension

pytestmark = pytest.mark.native

visible_once = cache(visible_rows)  # a token at a time
# prompt, chosen, rejected: tiles of 64 that are full, cut, crossed; responses without a token
LENGTHS = {
    "short": [(5, 7, 9), (1, 0, 3), (2, 4, 0), (1, 0, 0)],
    "tiles": [(64, 64, 64), (63, 1, 65), (130, 70, 129)],
}


@pytest.fixture(params=["float32", "bfloat16", "widened"], autouse=True)
def dtype(request, monkeypatch):
    """Of the tensors; bfloat16 as oneDNN's tiles where there are such, and widened to float32."""
    if request.param == "bfloat16" and not extension.BFLOAT16_TILES:
        pytest.skip("no bfloat16 tiles here: the widened ones are what runs")
    if request.param == "widened":
        monkeypatch.setattr(extension, "BFLOAT16_TILES", False)
    return torch.float32 if request.param == "float32" else torch.bfloat16


def spans_of(lengths) -> tuple[Span, ...]:
    spans, start = [], 0
    for prompt, chosen, rejected in lengths:
        middle = start + prompt + chosen
        spans.append((start, start + prompt, middle, middle + rejected))
        start = middle + rejected
    return tuple(spans)


def definition(query, key, value, spans, window=None) -> Tensor:  # (N, H, E)
    visible = visible_once(spans, window=window)
    heads = (x.transpose(0, 1) for x in (query, key, value))
    return plain(*heads, visible, scale=query.shape[2] ** -0.5).transpose(0, 1)


def run(attention, tensors, upstream):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def attend(spans, window=None, implementation=native):
    def call(query, key, value):
        terms = Terms(query.device, query.dtype, query.shape[2], value.shape[2], True, 0.0, window)
        assert implementation.why_not(terms) is None
        in_layers = [x.transpose(0, 1)[None] for x in (query, key, value)]
        return implementation.build(spans, terms, {})(*in_layers, None)[0]

    return call


def random_tensors(spans, heads, groups, width, dtype):
    draw = torch.Generator().manual_seed(0)
    make = lambda n: torch.randn(spans[-1][3], n, width, generator=draw).to(dtype)
    return [make(heads), make(groups), make(groups)], make(heads)


def errors(found, exact):
    """Largest error over the largest entry: output, then the three gradients.

    Of entries below 1 the error itself: a query with one key has a gradient of exactly zero.
    """
    return [
        ((a.double() - b).abs().max() / b.abs().max().clamp(min=1)).item()
        for a, b in zip(found, exact, strict=True)
    ]


@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize(("heads", "groups", "width"), [(6, 2, 64), (2, 2, 32), (4, 1, 96)])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_as_accurate_as_plain_pytorch(lengths, heads, groups, width, window, dtype):
    spans = spans_of(LENGTHS[lengths])
    tensors, upstream = random_tensors(spans, heads, groups, width, dtype)
    exact = run(lambda *x: definition(*x, spans, window), [x.double() for x in tensors], upstream)
    plain = run(lambda *x: definition(*x, spans, window), tensors, upstream)
    found = run(attend(spans, window), tensors, upstream)
    theirs = errors(plain, exact)
    if dtype == torch.float32:
        # delta, made of the output, is a fused kernel's own rounding: where a query has one key its
        # gradient is not the exact zero of a softmax's, in torch's kernel neither
        fused = run(attend(spans, window, sdpa), tensors, upstream)
        theirs = [max(x) for x in zip(theirs, errors(fused, exact), strict=True)]
    rounding = 2**-9 if dtype == torch.bfloat16 else 2**-22  # of the largest entry: no error
    for mine, other in zip(errors(found, exact), theirs, strict=True):
        assert mine <= (1.5 if dtype == torch.bfloat16 else 2) * other + rounding


@pytest.mark.parametrize("scale", [1e-3, 30.0], ids=["flat", "peaked"])
def test_scores_of_any_size(scale, dtype):
    """Weights that are all alike, and weights that are one and zeros, without overflow."""
    spans = spans_of(LENGTHS["tiles"])
    (query, key, value), upstream = random_tensors(spans, 2, 1, 32, dtype)
    tensors = [query * scale, key, value]
    exact = run(lambda *x: definition(*x, spans), [x.double() for x in tensors], upstream)
    found = run(attend(spans), tensors, upstream)
    assert all(x.isfinite().all() for x in found)
    plain = run(lambda *x: definition(*x, spans), tensors, upstream)
    for mine, other in zip(errors(found, exact), errors(plain, exact), strict=True):
        assert mine <= 2 * other + torch.finfo(dtype).eps


def test_pairs_and_responses_do_not_see_each_other(dtype):
    """A mask that only multiplies by zero would let a NaN through."""
    spans = spans_of([(40, 30, 20), (10, 70, 50)])
    tensors, upstream = random_tensors(spans, 2, 2, 32, dtype)
    whole = run(attend(spans), tensors, upstream)[0]
    for broken, clean in (
        (slice(40, 70), slice(70, 220)),  # chosen: not the rejected response, not the other pair
        (slice(70, 90), slice(0, 70)),  # rejected: not its prompt, not the chosen response
        (slice(90, 220), slice(0, 90)),  # the other pair
    ):
        changed = [x.clone() for x in tensors]
        for x in changed:
            x[broken] = torch.nan
        out = attend(spans)(*changed)
        assert torch.equal(out[clean], whole[clean])
        assert out[broken].isnan().all()


def test_the_same_bits_for_any_number_of_threads(dtype):
    spans = spans_of([*LENGTHS["tiles"], *LENGTHS["short"]])
    tensors, upstream = random_tensors(spans, 6, 3, 64, dtype)
    results = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            results.append(run(attend(spans), tensors, upstream))
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_tensors_of_any_layout(dtype):
    """As a layer hands them down: heads cut out of one wide row, rotated, or already (H, N)."""
    spans = spans_of(LENGTHS["tiles"])
    (query, key, value), upstream = random_tensors(spans, 4, 4, 32, dtype)
    expected = run(attend(spans), (query, key, value), upstream)
    fused = torch.cat([query, key, value], 2)  # (N, 4, 96), as GPT-NeoX has them
    views = fused.split(32, 2)
    found = run(attend(spans), views, upstream)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    other = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (query, key, value)]
    found = run(attend(spans), other, upstream.transpose(0, 1).contiguous().transpose(0, 1))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(dtype=torch.float64), "it needs float32 or bfloat16, got torch.float64"),
        (dict(device=torch.device("meta")), "it needs tensors on a CPU, got meta"),
        (dict(width=48), "it needs heads of one width, a multiple of 32, got 48 and 64"),
        (dict(dropout=0.1), "it has no dropout, the model's is 0.1"),
        (dict(softcap=50.0), "the logits are soft-capped at 50.0"),
    ],
)
def test_what_it_does_not_serve(change, reason, dtype):
    terms = dict(device=torch.device("cpu"), dtype=dtype, width=64, value_width=64)
    assert native.why_not(Terms(**terms, gradient=True)) is None
    assert native.why_not(Terms(**(terms | change), gradient=True)) == reason
