"""Stores filled by processes that may die, and what is left of them."""

import json
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys

import pytest
import torch
from scoring_for_tests import ORACLE, QUIET, REFERENCE, make_pairs
from tqdm import tqdm

from sepo.data.store.manifest import hash_json
from sepo.score.score import score_dataset

KEPT = {"scores": ("score",), "states": ("score", "logp", "hidden")}
MODELS = dict(reference=REFERENCE, oracle=ORACLE)

tqdm.get_lock()  # made here once, it is not left behind by every process that is killed


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """How a matrix product is cut among threads shows in its last bit, and parts are compared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_and_maybe_die(path, shard, replace_to_die_at, keep, pairs=None):
    """In its own process; dies by SIGKILL around its n-th rename: before it if n is even."""
    renames, rename = iter(range(1000)), os.replace

    def deadly(*names):
        number = next(renames)
        if number == replace_to_die_at // 2 and replace_to_die_at % 2 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*names)
        if number == replace_to_die_at // 2:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = deadly
    torch.set_num_threads(1)
    score_dataset(pairs or make_pairs(), path, keep=keep, shard=shard, **MODELS, **QUIET)


def everything(path):
    """Every file of a store by name: parts, their hidden rows, the head and the manifest."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(scope="module")
def processes():
    """Real processes that start in milliseconds: one server imports this module for all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scoring_runs"])
    with pytest.MonkeyPatch.context() as patch:
        # The server starts with neither this process's sys.path nor, without the second line, the
        # right to fork: a thread pool does not survive that.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.forkserver.ensure_running()
    return context


def of_before(tokenizer, like=None):
    """Older versions knew nothing of post-processing."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    content = {k: state[k] for k in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    names = ("bos_token", "eos_token", "unk_token")
    return hash_json([content, {name: getattr(tokenizer, name) for name in names}])
