"""Flex without a GPU: what its block mask costs, and how often its kernel is compiled."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.attention.flex_attention as theirs
from attention_cases import spans_of, tensors, terms_of
from plain_attention import built
from tiny import random_scored_pairs
from tiny_trainer import make_trainer
from torch._dynamo.testing import CompileCounterWithBackend

from sepo.attention import IMPLS, flex, layout
from sepo.errors import InputError

LENGTHS = [(300, 250, 280), (90, 410, 33), (500, 20, 200)]


class Touched(np.ndarray):
    """Counts the entries that numpy writes for it."""

    entries = 0

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        plain = [x.view(np.ndarray) if isinstance(x, Touched) else x for x in inputs]
        return counted(getattr(ufunc, method)(*plain, **options))

    def __array_function__(self, function, types, arguments, options):
        return counted(super().__array_function__(function, types, arguments, options))


def counted(result):
    if isinstance(result, tuple):
        return tuple(map(counted, result))
    if isinstance(result, np.ndarray):
        Touched.entries += result.size
        return result.view(Touched)
    return result


class CountingNumpy:
    """numpy whose arrays count. What `zeros` gives is written where something is put into it."""

    def __getattr__(self, name):
        found = getattr(np, name)
        if isinstance(found, type) or not callable(found) or name == "zeros":
            return found
        return lambda *arguments, **options: counted(found(*arguments, **options))


def touched(spans, window, monkeypatch):
    Touched.entries = 0
    with monkeypatch.context() as patch:
        patch.setattr(flex, "np", CountingNumpy())
        found = flex.arrays(spans, window)
    for name, expected in flex.arrays(spans, window).items():
        assert np.array_equal(found[name], expected), name
    return Touched.entries


@pytest.mark.parametrize("window", [None, 700])
def test_a_mask_of_four_times_the_pairs_costs_at_most_six_times_as_much(window, monkeypatch):
    """Rows times all blocks would be sixteen times as much."""
    once = touched(spans_of(LENGTHS * 4), window, monkeypatch)
    often = touched(spans_of(LENGTHS * 16), window, monkeypatch)
    rows = 16 * sum(map(sum, LENGTHS))
    assert rows < once * 4 < often * 1.5 and often <= 6 * once
    assert often < rows * rows / flex.BLOCK, "each row met each block"


@pytest.fixture
def compiled(monkeypatch):
    """Flex on the CPU as on a GPU: compiled, with a backward; how often, by a backend that counts."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(flex, "BACKEND", counter)
    monkeypatch.setattr(flex, "COMPILED_ON", ("cpu",))
    monkeypatch.setattr(theirs, "_validate_device", lambda *tensors: None)
    entry = replace(IMPLS[1], why_not=lambda terms: None)
    monkeypatch.setattr(layout, "IMPLS", (IMPLS[0], entry, *IMPLS[2:]))
    torch._dynamo.reset()
    flex._compiled.cache_clear()
    yield counter
    flex._compiled.cache_clear()
    torch._dynamo.reset()


def attend(lengths, *, width=16, softcap=None, window=None, gradient=True):
    spans = spans_of(lengths)
    inputs = [x.detach().float() for x in tensors(spans, width=width, value_width=width)]
    inputs = [x.requires_grad_(gradient) for x in inputs]
    terms = replace(terms_of(inputs[0], inputs[2], softcap=softcap, window=window))
    terms = replace(terms, gradient=gradient)
    return built(layout.IMPLS[1], spans, terms)(*inputs, None)


# of Dynamo, which looks at .grad of what a layer before has made
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_run_with_evaluation_compiles_a_few_times(compiled, tmp_path):
    """Micro-batches and evaluations of many lengths, some below one block, and a window."""
    pairs = random_scored_pairs(40, longest=50)
    trainer = make_trainer(
        tmp_path, arch="gemma2", pairs=pairs, eval_pairs={"long": pairs[:9], "short": pairs[:1]},
        method="simpo", max_tokens_per_batch=400, num_train_epochs=1, eval_strategy="steps",
        eval_steps=2, attn_impl="flex",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 8
    assert 0 < compiled.frame_count <= 8


def test_each_kind_has_a_limit_of_its_own(compiled):
    with torch._dynamo.config.patch(recompile_limit=1):
        for kind in ({}, dict(softcap=2.0), dict(softcap=3.0), dict(width=32)):
            attend(LENGTHS, **kind)
            attend(LENGTHS[1:], **kind, window=99)
    assert compiled.frame_count == 4


def test_the_limit_is_an_error_and_never_an_eager_run(compiled):
    with torch._dynamo.config.patch(recompile_limit=1):
        attend(LENGTHS)
        with pytest.raises(InputError, match="at most 1 compilations of a kernel .* for 9 rows"):
            attend([(2, 3, 4)])  # one block: sizes of one are another graph
    assert compiled.frame_count == 1


def test_it_is_compiled_where_hooks_make_all_else_run_eagerly(compiled):
    with torch.compiler.set_stance("force_eager"):
        attend(LENGTHS)
    assert compiled.frame_count == 1


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_compiled_it_is_what_it_is_eagerly(compiled, softcap, monkeypatch):
    found = attend(LENGTHS, softcap=softcap, gradient=False)
    monkeypatch.setattr(flex, "COMPILED_ON", ())
    monkeypatch.setattr(theirs, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    eager = attend(LENGTHS, softcap=softcap, gradient=False)
    torch.testing.assert_close(found, eager, rtol=0, atol=1e-5)
