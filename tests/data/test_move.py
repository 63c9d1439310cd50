"""A batch in one buffer, and the same values on the other side."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from sepo.data import all_positions, move, pack, truncate
from sepo.data.hidden import HiddenRows
from sepo.data.move import ALIGN, follow, laid_out


def some_batch(*, hidden=False):
    draw = np.random.default_rng(0).integers
    pairs = []
    for prompt, *lengths in ((3, 4, 5), (2, 6, 1)):
        responses = []
        for n in lengths:
            ref = np.arange(n, dtype=np.float32)
            rows = HiddenRows(torch.randn(n, 8).bfloat16(), 0, n) if hidden else None
            y = draw(0, 50, n).astype(np.int32)
            responses.append(truncate(y, all_positions(n), ref_logp=ref, ref_hidden=rows))
        pairs.append((draw(0, 50, prompt).astype(np.int32), *responses))
    batch = pack(pairs)
    arrays = {"a": torch.arange(5, dtype=torch.int32), "none": torch.empty(0, 4)}
    return replace(batch, attention={("flex", 4): arrays})


def values(batch):
    return batch._tensors()


def assert_equal(found, expected):
    assert found.spans == expected.spans
    assert values(found).keys() == values(expected).keys()
    for name, tensor in values(expected).items():
        assert torch.equal(values(found)[name], tensor), name


@pytest.fixture
def pinnable(monkeypatch):
    """Buffers that were asked for; this machine may have nothing to pin for."""
    asked = []

    def buffer(size):
        asked.append(torch.zeros(size, dtype=torch.uint8))
        return asked[-1]

    monkeypatch.setattr(move, "_pinned", buffer)
    return asked


@pytest.mark.parametrize("hidden", [False, True])
def test_pinned_it_is_the_same_batch_in_one_buffer(pinnable, hidden):
    batch = some_batch(hidden=hidden)
    found = batch.pin()
    assert_equal(found, batch)
    assert len(pinnable) == 1 + hidden and found.pin() is found
    (buffer,) = [b for b in pinnable if b.data_ptr() == found.pinned.data_ptr()]
    for name, tensor in values(found).items():
        inside = tensor.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
        assert inside == (name != ("ref_hidden",)), name
        assert tensor.storage_offset() * tensor.itemsize % ALIGN == 0 and tensor._base is None


def test_the_other_side_has_the_same_values():
    tensors = {
        "bytes": torch.tensor([True, False]), "long": torch.arange(7), "none": torch.empty(0, 3),
        "one": torch.tensor(2.5), "matrix": torch.randn(3, 5).bfloat16(),
        "transposed": torch.randn(4, 6).T,
    }  # fmt: skip
    buffer, views = laid_out(tensors, pinned=False)
    there = follow(views, buffer.clone(), torch.device("cpu"))
    for name, tensor in tensors.items():
        assert torch.equal(there[name], tensor) and there[name].dtype == tensor.dtype, name


def test_compiled_code_takes_them_wherever_they_begin():
    """Compiled layers get position ids from the buffer: each batch has them at another place."""
    counter = CompileCounterWithBackend("eager")
    layer = torch.compile(lambda ids, x: ids[None] * x, backend=counter, dynamic=True)
    for n in (5, 300, 777, 41):
        tensors = {"x": torch.rand(n), "more": torch.rand(3 * n), "ids": torch.arange(n)}
        _, views = laid_out(tensors, pinned=False)
        assert torch.equal(layer(views["ids"], views["x"])[0], tensors["ids"] * tensors["x"])
    assert counter.frame_count == 1


def test_on_the_cpu_nothing_is_copied(pinnable):
    batch = some_batch()
    assert batch.to("cpu") is batch and pinnable == []


@pytest.mark.parametrize("hidden", [False, True])
def test_elsewhere_every_tensor_arrives(pinnable, hidden):
    batch = some_batch(hidden=hidden)
    found = batch.to("meta")
    assert found.pinned is None and values(found).keys() == values(batch).keys()
    for name, tensor in values(batch).items():
        there = values(found)[name]
        assert (there.device.type, there.shape, there.dtype) == (
            "meta", tensor.shape, tensor.dtype,
        ), name  # fmt: skip


def test_the_batch_knows_all_its_tensors():
    """A new field that is a tensor moves with the others."""
    batch = some_batch(hidden=True)
    own = {f.name for f in fields(batch) if isinstance(getattr(batch, f.name), torch.Tensor)}
    assert own == {name[0] for name in values(batch) if len(name) == 1}


def test_without_pinned_memory_it_is_said_once(monkeypatch, capsys):
    def refuse(*args, pin_memory=False, **kwargs):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return real(*args, **kwargs)

    real = torch.empty
    monkeypatch.setattr(torch, "empty", refuse)
    move._say_pageable.cache_clear()
    batch = some_batch()
    assert_equal(batch.pin(), batch)
    batch.pin()
    assert capsys.readouterr().err == (
        "expected pinned memory for the copies to the GPU, got none (CUDA error: out of memory): "
        "copies will wait\n"
    )
