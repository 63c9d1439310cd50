"""Fused layers on a GPU: as right as the plain ones; and on a CPU, that the check runs and notices."""

import pytest
import torch
from accelerate.utils import TorchDynamoPlugin
from compiling import compiled
from gpu.step_checks import layers_agree

from sepo.trainer.fused import fuse_layers
from sepo.trainer.layers import compile_layers

HOW = ("liger", "compile")
DTYPES = (None, torch.bfloat16)


def fuse(how: str, backend: str = "inductor"):
    if how == "liger":
        return fuse_layers
    return lambda model: compile_layers(model, TorchDynamoPlugin(backend=backend))


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2"])
def test_as_accurate_as_the_plain_layers(arch, how, dtype):
    if how == "liger":
        pytest.importorskip("liger_kernel")
    layers_agree(arch, fuse(how), "cuda", dtype)


@compiled
def test_a_wrong_layer_is_noticed():
    def wrong(model):
        fuse("compile", "aot_eager")(model)
        model.model.layers[0].mlp.act_fn = torch.nn.GELU()

    with pytest.raises(AssertionError, match="error"):
        layers_agree("llama", wrong, "cpu")
