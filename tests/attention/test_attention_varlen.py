"""Varlen without a GPU: whose kernels it takes, what they are told, what autograd makes of it."""

import sys
from functools import partial
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from attention_cases import LENGTHS, asked, definition, spans_of, tensors
from gpu.attention_checks import batch_of
from plain_attention import PLAIN_VARLEN, plain_flash
from tiny import tiny_model
from torch.nn.attention.bias import causal_lower_right

from sepo.attention import explain, layout, varlen
from sepo.model.prepare import prepare_model


def test_sequences_are_what_causal_lower_right_says():
    """Queries and keys of the lengths that the kernels are told: theirs align the last of both."""
    spans = spans_of(LENGTHS)
    query, key, value = (x.detach().squeeze(0) for x in tensors(spans))
    arrays = {name: torch.from_numpy(x) for name, x in varlen.arrays(spans, None).items()}
    key, value = key[:, arrays["rows"]], value[:, arrays["rows"]]
    pieces = lambda x, cu: x.split(arrays[cu].diff().tolist(), 1)
    found = []
    for q, k, v in zip(
        pieces(query, "cu_queries"), pieces(key, "cu_keys"), pieces(value, "cu_keys"), strict=True
    ):
        bias = causal_lower_right(q.shape[1], k.shape[1])
        visible = bias._materialize("cpu") if hasattr(bias, "_materialize") else bias
        found.append(
            F.scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=visible, enable_gqa=True
            )
        )
    found = torch.cat(found, 2).transpose(1, 2)
    scale = query.shape[-1] ** -0.5
    expected = definition([x.detach() for x in tensors(spans)], spans, scale=scale)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


class Opaque(torch.autograd.Function):
    """One node of the graph, as a kernel is."""

    @staticmethod
    def forward(ctx, run, *tensors):
        with torch.enable_grad():
            ctx.leaves = [x.detach().requires_grad_() for x in tensors]
            ctx.out = run(*ctx.leaves)
        return ctx.out.detach()

    @staticmethod
    def backward(ctx, grad):
        return None, *torch.autograd.grad(ctx.out, ctx.leaves, grad)


def opaque_flash(query, key, value, *places, **options):
    run = lambda q, k, v: plain_flash(q, k, v, *places, **options)
    return Opaque.apply(run, query, key, value)


def nodes(tensor):
    """Names of all nodes of its autograd graph."""
    seen, todo = set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return sorted(node.name() for node in seen)


def test_no_layer_selects(monkeypatch):
    """A select's backward fills a buffer of zeros: three of them a layer, of query, key, value."""
    entry = layout.AttentionImpl(
        "varlen", lambda: None, lambda terms: None, partial(varlen.build, kernel=opaque_flash),
        arrays=varlen.arrays,
    )  # fmt: skip
    monkeypatch.setattr(layout, "IMPLS", (entry, *layout.IMPLS[1:]))
    model = prepare_model(tiny_model("llama"), attn_impl="varlen")
    found = nodes(model(batch=batch_of([(9, 5, 7), (3, 4, 4)])).sum())
    assert found.count("OpaqueBackward") == 2 and found.count("_GatherBackward") == 4
    assert not [name for name in found if name.startswith("Select")]


# FlashAttention 3


@pytest.fixture
def hopper(gpu, monkeypatch):
    """torch's registry of flash kernels, told what the returned list holds; FA3 is installed."""
    told = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", told.append)
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))
    monkeypatch.setattr(varlen, "find_spec", lambda name: name != "flash_attn" or None)
    varlen._activate_flash3.cache_clear()
    yield told
    varlen._activate_flash3.cache_clear()


def test_fa3_is_taken_where_it_is_and_only_once(hopper):
    for window in (None, 4):
        varlen._kernel(asked(window=window))
    assert hopper == ["FA3"]
    assert explain("auto", asked()) == "varlen (FA3)"


@pytest.mark.parametrize(
    ("place", "name", "value", "reason"),
    [
        (torch.cuda, "get_device_capability", lambda device: (8, 0), "compute capability 9.0"),
        (torch.cuda, "get_device_capability", lambda device: (10, 0), "compute capability 9.0"),
        (varlen, "find_spec", lambda name: None, "flash_attn_interface is not installed"),
        (torch.nn.attention, "current_flash_attention_impl", lambda: "FA4", "FA4 was activated"),
    ],
)
def test_fa3_is_never_required(hopper, monkeypatch, place, name, value, reason):
    monkeypatch.setattr(place, name, value)
    varlen._kernel(asked())
    assert hopper == [] and reason in explain("auto", asked())


def test_an_old_torch_has_no_fa3(hopper, monkeypatch):
    monkeypatch.delattr(torch.nn.attention, "activate_flash_attention_impl")
    assert "has no other" in explain("auto", asked())


def test_fa3_for_another_torch_is_said(hopper, monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: x")

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", broken)
    varlen._kernel(asked())
    assert explain("auto", asked()) == "varlen (FA2: FA3 can't be loaded: undefined symbol: x)"


def test_arrays_do_not_depend_on_the_window():
    assert PLAIN_VARLEN.key(asked()) == PLAIN_VARLEN.key(asked(window=4))
