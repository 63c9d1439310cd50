"""How many calls lie between a training step and the head's product."""

import pytest
import torch
from tiny import random_scored_pairs
from tiny_trainer import make_trainer

from sepo_kernels import extension
from tools.hops import below_training_step, hops

NATIVE = extension.why_not("native_logprob_rows", torch.device("cpu")) is None
MOST = 8 if NATIVE else 9  # plain PyTorch adds scale and bias in a function of its own


@pytest.mark.parametrize("method", ["sepo", "dpo", "tdpo2"])
def test_a_step_is_near_its_product(tmp_path, method):
    trainer = make_trainer(tmp_path, method=method, pairs=random_scored_pairs(5), max_steps=1)
    path = below_training_step(hops(trainer.train))
    assert path, "no product was seen"
    assert len(path) <= MOST, path
    assert path[-1].file.startswith("sepo_kernels")
