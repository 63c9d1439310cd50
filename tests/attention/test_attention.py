"""Every implementation of attention, alone, against its definition on random queries and keys."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from attention_cases import LENGTHS, asked, definition, spans_of, tensors, terms_of
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_attention import PLAIN_VARLEN, built, visible_rows

from sepo.attention import (
    IMPLS,
    PackedLayout,
    check_name,
    choose,
    explain,
    flex,
    layout,
    native,
    sdpa,
    varlen,
)
from sepo.errors import InputError
from sepo.trainer.config import AttnImpl

_, FLEX, _, SDPA = IMPLS
SERVED = {"sdpa": SDPA, "varlen": PLAIN_VARLEN}
OPTIONS = [{}, dict(window=4), dict(window=1), dict(softcap=2.0), dict(window=6, softcap=2.0)]
FLEX_WARNING = "ignore:flex_attention called without torch.compile"


def assert_exact(impl, spans, inputs, *, scale=0.3, **options):
    found = built(impl, spans, terms_of(inputs[0], inputs[2], **options))(*inputs, scale)
    expected = definition(inputs, spans, scale=scale, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("heads", [(4, 2), (6, 2), (4, 4), (3, 1)], ids=str)
@pytest.mark.parametrize("name", SERVED)
def test_values_and_gradients_are_the_definition(name, heads, options):
    spans = spans_of(LENGTHS)
    inputs = tensors(spans, heads=heads[0], kv_heads=heads[1])
    assert_exact(SERVED[name], spans, inputs, **options)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6), st.integers(0, 6)), min_size=1,
                     max_size=4),
    window=st.none() | st.integers(1, 9),
    softcap=st.none() | st.just(1.5),
)  # fmt: skip
def test_any_lengths_and_windows(lengths, window, softcap):
    spans = spans_of(lengths)
    inputs = tensors(spans)
    for impl in SERVED.values():
        assert_exact(impl, spans, inputs, window=window, softcap=softcap)


@pytest.mark.filterwarnings(FLEX_WARNING)
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[1], OPTIONS[4]], ids=str)
def test_flex_forward_is_the_definition(options):
    spans = spans_of([*LENGTHS, (100, 30, 90), (3, 40, 50)])  # blocks of 128: whole, part, none
    inputs = [x.detach() for x in tensors(spans)]
    found = built(FLEX, spans, terms_of(inputs[0], inputs[2], **options))(*inputs, 0.3)
    expected = definition(inputs, spans, scale=0.3, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 3, 140])
@pytest.mark.parametrize("lengths", [LENGTHS, [(150, 40, 200), (3, 4, 5)], [(270, 0, 9)]], ids=len)
def test_flex_blocks_cover_what_is_visible(lengths, window):
    """On a GPU a block that is listed nowhere is never read, a whole one never masked."""
    spans = spans_of(lengths)
    made = flex.arrays(spans, window)
    mask = flex._block_mask({name: torch.from_numpy(array) for name, array in made.items()})
    visible = visible_rows(spans, window=window)
    rows = len(visible)
    index = torch.arange(rows)
    assert torch.equal(mask.mask_mod(0, 0, index[:, None], index[None]), visible)
    blocks = -(-rows // flex.BLOCK)
    padded = torch.zeros(blocks * flex.BLOCK, blocks * flex.BLOCK, dtype=torch.bool)
    padded[:rows, :rows] = visible
    tiles = padded.view(blocks, flex.BLOCK, blocks, flex.BLOCK).transpose(1, 2).flatten(2)
    whole, part = tiles.all(-1), tiles.any(-1) & ~tiles.all(-1)

    def listed(number, indices):
        table = torch.zeros(blocks, blocks, dtype=torch.bool)
        for i in range(blocks):
            table[i, indices[0, 0, i, : number[0, 0, i]].long()] = True
        return table

    assert torch.equal(listed(mask.kv_num_blocks, mask.kv_indices), part)
    assert torch.equal(listed(mask.q_num_blocks, mask.q_indices), part.T)
    assert torch.equal(listed(mask.full_kv_num_blocks, mask.full_kv_indices), whole)
    assert torch.equal(listed(mask.full_q_num_blocks, mask.full_q_indices), whole.T)


def test_sdpa_masks_are_no_larger_than_one_pair(monkeypatch):
    """Sixteen pairs share one mask, and without a window the first segments need none."""
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention

    def recording(*args, attn_mask=None, **kwargs):
        seen.append(attn_mask)
        return real(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(sdpa.F, "scaled_dot_product_attention", recording)
    spans = spans_of([(20, 30, 10)] * 16)
    inputs = tensors(spans)
    built(SDPA, spans, terms_of(inputs[0], inputs[2]))(*inputs, None)
    assert [m is None for m in seen] == [True, False] * 16
    storages = {m.untyped_storage().data_ptr(): m for m in seen if m is not None}
    (mask,) = storages.values()
    assert mask.untyped_storage().nbytes() == 10 * (20 + 10) * mask.itemsize


def test_layers_of_equal_terms_share_what_is_built(monkeypatch):
    from sepo.data import pack

    seen = []
    build = lambda spans, terms, arrays: seen.append(terms) or sdpa.build(spans, terms, arrays)
    monkeypatch.setattr(layout, "IMPLS", (*layout.IMPLS[:-1], replace(SDPA, build=build)))
    shared = PackedLayout(pack([]), "auto")
    query, key, value = tensors(((0, 1, 1, 1),))
    for window in (None, 4, None, 4):
        shared.attend(query, key, value, scale=None, window=window)
    assert [terms.window for terms in seen] == [None, 4]
    assert shared.windows == [None, 4, None, 4]


def test_dropout_is_drawn_anew_each_time():
    spans = spans_of([(3, 4, 5)])
    inputs = tensors(spans)
    for options in ({}, dict(softcap=2.0)):
        attend = built(SDPA, spans, terms_of(inputs[0], inputs[2], dropout=0.5, **options))
        assert not torch.equal(attend(*inputs, None), attend(*inputs, None))


# Which implementation, and why not another

ON_A_CPU = "sdpa" if native.absent() else "native"


@pytest.mark.parametrize(
    ("terms", "chosen"),
    [
        (asked(), "varlen"),
        (asked(dtype=torch.float16, window=9), "varlen"),
        (asked(softcap=50.0), "flex"),
        (asked(width=20), "flex"),
        (asked(width=512), "flex"),
        (asked(width=192, value_width=128), "flex"),
        (asked(dropout=0.1), "sdpa"),
        (asked(width=12), "sdpa"),
        (asked(dtype=torch.float32), "sdpa"),
        (asked("cpu", torch.float32), ON_A_CPU),
        (asked("cpu", torch.float32, gradient=False), ON_A_CPU),
        (asked("cpu", torch.float64), "sdpa"),
    ],
    ids=str,
)
def test_auto_takes_the_first_that_can_run(gpu, terms, chosen):
    assert choose("auto", terms).name == chosen
    assert explain("auto", terms).startswith(chosen)


@pytest.mark.parametrize(
    ("name", "terms", "reason"),
    [
        ("varlen", asked("cpu"), "needs a CUDA device, got cpu"),
        ("varlen", asked(dtype=torch.float32), "needs float16 or bfloat16, got torch.float32"),
        ("varlen", asked(width=20), "a multiple of 8 up to 256, got 20 and 20"),
        ("varlen", asked(softcap=50.0), "soft-capped at 50.0, which needs flash_attn"),
        ("varlen", asked(dropout=0.1), "no dropout, the model's is 0.1"),
        ("flex", asked("cpu"), "no FlexAttention backward on a CPU"),
        ("flex", asked(dropout=0.1), "no dropout, the model's is 0.1"),
        ("flex", asked(dtype=torch.float64), "got torch.float64"),
        ("flex", asked(width=8), "at least 16 wide, got 8 and 8"),
    ],
    ids=str,
)
def test_a_named_one_never_falls_back(gpu, name, terms, reason):
    with pytest.raises(InputError, match=f"attn_impl={name} cannot run here: .*{reason}"):
        choose(name, terms)


def test_unknown_names_and_what_the_machine_lacks(monkeypatch):
    with pytest.raises(InputError, match="one of auto, varlen, .*sdpa, got flash"):
        check_name("flash")
    for name in ("auto", "sdpa", "flex"):
        check_name(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="attn_impl=varlen cannot run here: it needs a CUDA"):
        check_name("varlen")


def test_the_flag_knows_every_implementation():
    names = {"auto", *(impl.name for impl in layout.IMPLS)}
    assert set(get_args(AttnImpl)) == names


def test_an_old_varlen_attn_is_no_varlen_attn(gpu, monkeypatch):
    """torch 2.10's has neither scale nor window; flash_attn serves then, if it is there."""
    assert varlen.kernel_name(softcap=False) == varlen.TORCH
    monkeypatch.setattr(varlen, "_torch_parameters", lambda: {"query", "is_causal"})
    assert "flash_attn is missing" in varlen.why_not(asked())
    monkeypatch.setattr(varlen, "find_spec", lambda name: name)
    assert varlen.why_not(asked()) is None
    assert varlen.why_not(asked(softcap=50.0)) is None


@pytest.mark.parametrize("grouped", [False, True])
def test_torch_is_called_as_its_version_wants(monkeypatch, grouped):
    """2.11 lacks enable_gqa, 2.12 insists on it; (-1, 0) is what both read as causal."""
    import torch.nn.attention.varlen as theirs

    calls = []

    def old(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        calls.append(dict(scale=scale, window_size=window_size))

    def new(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1),
            enable_gqa=False):  # fmt: skip
        calls.append(dict(scale=scale, window_size=window_size, enable_gqa=enable_gqa))

    monkeypatch.setattr(theirs, "varlen_attn", new if grouped else old)
    for window in (None, 4):
        varlen._torch_kernel()(*[None] * 5, 3, 5, scale=0.5, window=window, softcap=None)
    extra = {"enable_gqa": True} if grouped else {}
    assert calls == [
        dict(scale=0.5, window_size=(-1, 0), **extra),
        dict(scale=0.5, window_size=(3, 0), **extra),
    ]
