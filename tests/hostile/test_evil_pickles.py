"""Files that would run code if anything unpickled them, in every place where a file is read."""

import hashlib
import io
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from hostile.damage import READ
from tiny import random_scored_pairs, tiny_model, tiny_tokenizer
from tiny_trainer import make_trainer
from training_run import write_store

from sepo.data.read.read import read_pairs
from sepo.data.store.manifest import sealed
from sepo.data.store.store import verify_store
from sepo.model.fingerprint import checkpoint_hash
from sepo.model.load import load_model, load_tokenizer
from sepo.report.runs import read_run
from sepo.trainer.checkpoints import MARK


class Evil:
    """Makes a file named by the environment when it is unpickled."""

    def __reduce__(self):
        return eval, ("open(__import__('os').environ['SEPO_EVIL'], 'w').close()",)


def saved(**options) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state": Evil()}, buffer, **options)
    return buffer.getvalue()


def array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Evil()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


FORMS = {
    "pickle 0": lambda: pickle.dumps(Evil(), 0),
    "pickle 4": lambda: pickle.dumps(Evil(), 4),
    "torch": saved,
    "torch, legacy": lambda: saved(_use_new_zipfile_serialization=False),
    "numpy": array,
}


@pytest.fixture(params=FORMS)
def evil(request, tmp_path, monkeypatch) -> bytes:
    monkeypatch.setenv("SEPO_EVIL", str(tmp_path / "it ran"))
    return FORMS[request.param]()


@pytest.fixture
def calm(tmp_path, figures):
    """calm(f, *arguments): whatever f raises, no code of the file's has run."""

    def check(f, *arguments):
        try:
            f(*arguments)
        except Exception:  # that it is refused, and how, is asked elsewhere
            pass
        ran = (tmp_path / "it ran").exists()
        figures("evil files", tried=1, ran=int(ran))
        assert not ran, f"{f} ran the file's code"

    return check


def test_the_files_would_run(evil, tmp_path):
    """Else the others would not tell."""
    load = lambda: np.load(io.BytesIO(evil), allow_pickle=True)
    torch_load = lambda: torch.load(io.BytesIO(evil), weights_only=False)
    for read in (lambda: pickle.loads(evil), torch_load, load):
        try:
            read()
        except Exception:
            continue
    assert (tmp_path / "it ran").exists()


def test_a_store(evil, tmp_path, calm):
    make, read = READ["store"]
    path = make(tmp_path / "store")
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(evil)
        calm(read, path)
        calm(verify_store, path)
        file.write_bytes(whole)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet", ".arrow", ".pkl", ".pt"])
def test_data(evil, tmp_path, calm, suffix):
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(evil)
    calm(read_pairs, str(file), tiny_tokenizer())
    (tmp_path / "folder").mkdir()
    shutil.copy(file, tmp_path / "folder" / "state.json"), shutil.copy(file, tmp_path / "folder")
    calm(read_pairs, str(tmp_path / "folder"), tiny_tokenizer())


def test_a_log(evil, tmp_path, calm):
    (tmp_path / "metrics.jsonl").write_bytes(evil)
    calm(read_run, tmp_path, "run")


def test_a_model(evil, tmp_path, calm):
    """Beside its safetensors, instead of them, and as an adapter's."""
    path = tmp_path / "model"
    tiny_model().save_pretrained(path), tiny_tokenizer().save_pretrained(path)
    for name in ("pytorch_model.bin", "training_args.bin", "tokenizer.model", "adapter_model.bin"):
        (path / name).write_bytes(evil)
    weights = (path / "model.safetensors").read_bytes()
    reads = (load_model, load_tokenizer, checkpoint_hash)
    for content in (weights, evil, None):
        (path / "model.safetensors").unlink(missing_ok=True)
        if content is not None:
            (path / "model.safetensors").write_bytes(content)
        for read in reads:
            calm(read, str(path))
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (path / name).write_text(json.dumps(index))
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(path), "task_type": "CAUSAL_LM"}
    (path / "adapter_config.json").write_text(json.dumps(adapter))
    for read in reads:
        calm(read, str(path))


def test_a_checkpoint_that_vouches_for_it(evil, tmp_path, calm):
    """Each of its files, and a mark with that file's size and hash."""
    make, _ = READ["checkpoint"]
    whole = make(tmp_path / "run")
    names = [name for name in json.loads((whole / MARK).read_text())["files"]]
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth"} <= set(names)
    flags = dict(method="sepo", optim="adamw_torch", max_steps=3, logging_steps=3)
    for name in names:
        path = tmp_path / "checkpoint-2"
        shutil.copytree(whole, path)
        (path / name).write_bytes(evil)
        mark = json.loads((path / MARK).read_text())
        mark["files"][name] = [len(evil), hashlib.sha256(evil).hexdigest()]
        mark.pop("check", None)
        (path / MARK).write_text(json.dumps(sealed(mark)))
        trainer = make_trainer(tmp_path / "out", **flags)
        calm(lambda trainer=trainer, path=path: trainer.train(str(path)))
        shutil.rmtree(path)


def test_a_store_beside_evil_files(evil, tmp_path, calm):
    """Names that libraries look for in a folder."""
    write_store(tmp_path / "store", random_scored_pairs(3))
    for name in ("state.json", "dataset_info.json", "dataset_dict.json", "a.pkl", "train.parquet"):
        (tmp_path / "store" / name).write_bytes(evil)
    calm(verify_store, tmp_path / "store")
    calm(read_pairs, str(tmp_path / "store"), tiny_tokenizer())
