"""Micro-batches reach the device packed one ahead, in one pinned copy, with the same bits."""

import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from plain_attention import PLAIN_VARLEN, serve_varlen_anywhere
from scoring_for_tests import ORACLE, QUIET, REFERENCE, make_pairs, parts
from tiny import tiny_model
from tiny_trainer import PAIRS, make_trainer, weights
from torch.utils._python_dispatch import TorchDispatchMode

import sepo.model.feed
import sepo.score.logp
from sepo import SePOConfig
from sepo.attention import layout, varlen
from sepo.data import all_positions, move, pack, truncate
from sepo.data.hidden import HiddenRows
from sepo.data.store.store import StoreWriter
from sepo.errors import InputError
from sepo.model.feed import StepFeed, works_ahead
from sepo.model.prepare import prepare_model
from sepo.score.score import score_dataset, score_pairs

MODELS = dict(reference=REFERENCE, oracle=ORACLE)
THERE = torch.device("meta")  # stands for a GPU


def test_only_a_device_leaves_the_host_time_to_work_ahead():
    assert (
        works_ahead(torch.device("cuda", 0))
        and works_ahead(THERE)
        and not works_ahead(torch.device("cpu"))
    )


class Buffers(list):
    def __init__(self):
        self.made_by = set()  # threads


@pytest.fixture
def pinned(monkeypatch):
    """Every buffer that was asked for, pinned or not: this machine has nothing to pin for."""
    buffers = Buffers()

    def buffer(size):
        buffers.made_by.add(threading.current_thread().name)
        buffers.append(torch.zeros(size, dtype=torch.uint8))
        return buffers[-1]

    monkeypatch.setattr(move, "_pinned", buffer)
    return buffers


@pytest.fixture
def ahead(monkeypatch, pinned):
    """On the CPU as on a GPU, in all but the copy; the threads that packed something."""
    threads = set()
    real = sepo.model.feed.with_arrays

    def with_arrays(batch, needs):
        threads.add(threading.current_thread().name)
        return real(batch, needs)

    monkeypatch.setattr(sepo.model.feed, "works_ahead", lambda device: True)
    monkeypatch.setattr(sepo.model.feed, "with_arrays", with_arrays)
    return threads


def running():
    return [t for t in threading.enumerate() if t.name.startswith("sepo-next-batch")]


def run(tmp_path, **options):
    trainer = make_trainer(
        tmp_path, max_tokens_per_batch=64, eval_strategy="steps", eval_steps=1, num_train_epochs=2,
        logging_steps=1, **options,
    )  # fmt: skip
    trainer.train()
    history = [{k: v for k, v in line.items() if "second" not in k} for line in
               trainer.state.log_history]  # fmt: skip
    return weights(trainer), history[:-1]


@pytest.mark.parametrize("options", [dict(method="sepo"), dict(arch="gemma2", method="sepo-rand")])
def test_training_and_evaluation_ahead_give_the_same_bits(tmp_path, monkeypatch, ahead, options):
    serve_varlen_anywhere(monkeypatch)
    found = run(tmp_path, attn_impl="varlen", **options)
    assert ahead and all(name.startswith("sepo-next-batch") for name in ahead) and not running()
    monkeypatch.undo()
    serve_varlen_anywhere(monkeypatch)
    expected = run(tmp_path, attn_impl="varlen", **options)
    assert found[1] == expected[1]
    assert all(torch.equal(found[0][name], w) for name, w in expected[0].items())


def test_no_layer_makes_arrays_that_came_with_the_batch(tmp_path, monkeypatch, ahead):
    made = []
    arrays = lambda *given: made.append(threading.current_thread().name) or varlen.arrays(*given)
    entry = replace(PLAIN_VARLEN, arrays=arrays, by_window=True)  # gemma2 has two
    monkeypatch.setattr(layout, "IMPLS", (entry, *layout.IMPLS[1:]))
    trainer = make_trainer(tmp_path, arch="gemma2", attn_impl="varlen", method="sepo")
    made.clear()  # of the first look at the model
    trainer.train()
    assert len(made) >= 3 and set(made) == {"sepo-next-batch_0"}


class Broken(list):
    """Pairs of which one can't be read any more once the trainer has seen them all."""

    bad = None

    def __getitem__(self, index):
        if index == self.bad:
            raise InputError(f"row {index}: damaged")
        return super().__getitem__(index)


@pytest.mark.parametrize("works", [False, True])
def test_an_error_stops_the_same_step_with_the_same_words(tmp_path, monkeypatch, pinned, works):
    monkeypatch.setattr(sepo.model.feed, "works_ahead", lambda device: works)
    pairs = Broken(PAIRS)
    trainer = make_trainer(tmp_path, pairs=pairs, method="sepo", pairs_per_step=2)
    pairs.bad = int(trainer._train_plan(3).pairs[0])
    with pytest.raises(InputError, match=f"row {pairs.bad}: damaged"):
        trainer.train()
    assert trainer.state.global_step == 3 and not running()


def test_a_step_that_fails_leaves_nothing_running(tmp_path, monkeypatch, ahead):
    trainer = make_trainer(tmp_path, method="sepo", pairs_per_step=2)

    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(trainer, "_losses", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert not running()
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.evaluate()
    assert not running()


def test_steps_take_up_where_the_one_before_stopped():
    begun = []

    def batches_of(parts):
        begun.append("new")
        yield from parts

    feed = StepFeed(lambda step: [(step, 0), (step, 1)], batches_of)
    take = lambda step, last: [next(batches) for batches in [feed.of(step, last)] * 2]
    assert take(0, 9) == [(0, 0), (0, 1)] and take(1, 9) == [(1, 0), (1, 1)]
    assert begun == ["new"]
    assert take(1, 9) == [(1, 0), (1, 1)]  # tried again
    assert take(5, 9) == [(5, 0), (5, 1)]  # resumed
    assert begun == ["new"] * 3
    feed.close()
    assert [*feed.of(6, 8)] == [(6, 0), (6, 1), (7, 0), (7, 1)]  # nothing beyond the last
    feed.close()
    assert take(3, 0) == [(3, 0), (3, 1)] and take(4, 0) == [(4, 0), (4, 1)]  # nobody said which


# Copies to a device. Tensors on "meta" go through a whole step by their shapes


class Copies(TorchDispatchMode):
    """What goes from the CPU to the device: the storages it comes from."""

    def __init__(self):
        super().__init__()
        self.sources = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        moves = function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        if moves and out.device == THERE and tensors[-1].device.type == "cpu":
            self.sources.append(tensors[-1].untyped_storage().data_ptr())
        return out


@pytest.fixture
def device(monkeypatch, pinned):
    """Everything there is served by varlen, its kernel by shapes."""
    serve = replace(PLAIN_VARLEN, build=partial(varlen.build, kernel=varlen._torch_kernel()))
    monkeypatch.setattr(layout, "IMPLS", (serve, *layout.IMPLS[1:]))
    monkeypatch.setattr(SePOConfig, "device", THERE)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)


def assert_one_pinned_copy_each(copies, pinned, batches):
    ours = {buffer.untyped_storage().data_ptr() for buffer in pinned}
    assert len(copies.sources) == batches and set(copies.sources) <= ours, copies.sources


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_a_step_copies_once_a_micro_batch(tmp_path, request, pinned, arch):
    trainer = make_trainer(tmp_path, arch=arch, method="sepo", max_tokens_per_batch=64)
    trainer.state.max_steps = 3
    request.getfixturevalue("device")
    trainer.model.to(THERE)
    micro_batches = len(trainer._parts(trainer._train_plan(0)))
    assert micro_batches >= 2
    with Copies() as copies:
        loss = trainer.training_step(trainer.model, {})
    trainer._feed.close()
    assert loss.device == THERE and pinned.made_by == {"sepo-next-batch_0"}
    assert_one_pinned_copy_each(copies, pinned, micro_batches)


def test_scoring_copies_once_a_batch_for_both_models(monkeypatch, request, pinned):
    pairs = make_pairs(8)
    models = [prepare_model(tiny_model("llama")).to(THERE) for _ in range(2)]
    request.getfixturevalue("device")

    def zeros(states, weight, rows, targets, **options):
        assert states.device == rows.device == targets.device == THERE
        return torch.zeros(len(rows))

    monkeypatch.setattr(sepo.score.logp, "selected_logprob", zeros)
    batches = []
    with Copies() as copies:
        found = score_pairs(pairs, *models, max_tokens=40, on_batch=batches.append)
    assert [len(p.chosen_score) for p in found] == [len(p.chosen) for p in pairs]
    assert len(batches) >= 2 and sum(batches) == sum(map(len, pairs))
    assert_one_pinned_copy_each(copies, pinned, len(batches))


def test_scoring_makes_the_next_parts_first_batch_ahead(tmp_path, monkeypatch, ahead):
    """By one thread for all parts, with the bits of a CPU's way."""
    run = lambda name: parts(score_dataset(make_pairs(), tmp_path / name, **MODELS, **QUIET))
    with monkeypatch.context() as patch:
        patch.setattr(sepo.model.feed, "works_ahead", lambda device: False)
        expected = run("in turn")
    assert not ahead
    made = [threading.Event() for _ in expected]
    waiting, pack, write = iter(made), sepo.score.logp.pack, StoreWriter.write

    def watched_pack(pairs):
        next(waiting).set()
        return pack(pairs)

    def watched_write(self, part, *args, **options):
        assert all(one.wait(5) for one in made[: part + 2]), "the next part's is made meanwhile"
        write(self, part, *args, **options)

    monkeypatch.setattr(sepo.score.logp, "pack", watched_pack)
    monkeypatch.setattr(StoreWriter, "write", watched_write)
    assert run("ahead") == expected and len(ahead) == 1 and not running()


def test_an_error_ahead_of_scoring_is_the_same_line(tmp_path, monkeypatch, ahead):
    """What was scored before it is written."""
    pack = sepo.score.logp.pack

    def damaged(pairs):
        if len(ahead_of) == 2:
            raise InputError("pair r4: damaged")
        ahead_of.append(1)
        return pack(pairs)

    ahead_of = []
    monkeypatch.setattr(sepo.score.logp, "pack", damaged)
    with pytest.raises(InputError, match="^pair r4: damaged$"):
        score_dataset(make_pairs(), tmp_path, **MODELS, **QUIET)
    assert [name[:10] for name in parts(tmp_path)] == ["part-00000", "part-00001"]
    assert not running()


def test_cached_states_are_a_copy_of_their_own(pinned):
    rows = HiddenRows(torch.randn(3, 8).bfloat16(), 0, 3)
    ids = np.arange(3, dtype=np.int32)
    whole = truncate(ids, all_positions(3), ref_hidden=rows)
    with Copies() as copies:
        batch = pack([(ids, whole, whole)]).to(THERE)
    assert {t.device for t in batch._tensors().values()} == {THERE}
    assert_one_pinned_copy_each(copies, pinned, 2)
