"""Pairs, models and a tokenizer to score with: tiny, and made without a file or a network."""

import numpy as np
import torch
from tiny import V, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sepo.data.types import TokenPair
from sepo.model.prepare import prepare_model


def make_tokenizer(offset=0):
    words = {f"w{(i + offset) % V}": i for i in range(V)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1", unk_token="w0")


def make_pairs(count=10, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda: rng.integers(0, V, rng.integers(1, 9)).astype(np.int32)
    return [
        TokenPair(id=f"r{i}", prompt=draw(), chosen=draw(), rejected=draw()) for i in range(count)
    ]


def make_models(arch="llama"):
    """An oracle close to its reference, as one trained from it is."""
    reference, oracle = tiny_model(arch), tiny_model(arch)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return prepare_model(reference), prepare_model(oracle)


REFERENCE, ORACLE = make_models()
TOKENIZER = make_tokenizer()
QUIET = dict(tokenizer=TOKENIZER, pairs_per_part=2, progress=False)


def tiny_in(dtype, seed):
    return prepare_model(tiny_model(seed=seed, dtype=dtype))


def save_models(path):
    folders = []
    for name, model in (("reference", REFERENCE), ("oracle", ORACLE)):
        folders.append(str(path / name))
        model.save_pretrained(folders[-1])
        TOKENIZER.save_pretrained(folders[-1])
    return folders


def parts(path):
    return {file.name: file.read_bytes() for file in sorted(path.glob("part-*"))}
