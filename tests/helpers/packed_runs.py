"""One random model, packed and in its own separate passes: log-probabilities and gradients."""

from functools import cache

import numpy as np
import peft
import torch
from dense import dense_token_logprob, random_triples
from tiny import V, tiny_model

from sepo.data import all_positions, pack, truncate
from sepo.model.prepare import prepare_model

TRIPLES = random_triples(np.random.default_rng(7), pairs=5, vocab_size=V)
# projections of every architecture, their names a pattern of peft's
LORA = r".*\.(q_proj|v_proj|o_proj|query_key_value|c_attn|down_proj|dense_4h_to_h)"


def packed():
    whole = lambda response: truncate(response, all_positions(len(response)))
    return pack([(p, whole(c), whole(r)) for p, c, r in TRIPLES])


def run(compute, arch, dtype, *, checkpointing=False, lora=False, weights=None, **overrides):
    """Log-probabilities and the gradients of all trained parameters, of one random model."""
    model = tiny_model(arch, dtype=dtype, **overrides)
    if weights is not None:
        model.load_state_dict(tiny_model(arch, dtype=weights, **overrides).state_dict())
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()  # its name before transformers 5.20
        model.train()  # nothing is dropped: see NO_DROPOUT
    if lora:
        model = with_lora(model)
    logp = compute(model)
    upstream = torch.randn(len(logp), generator=torch.Generator().manual_seed(1))
    logp.backward(upstream.to(logp.dtype))
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return logp.detach(), grads


def with_lora(model, **options):
    """Adapters with weights large enough to matter; they start at zero otherwise."""
    transposed = model.config.model_type == "gpt2"  # its Conv1D
    options = dict(r=4, target_modules=LORA, fan_in_fan_out=transposed) | options
    model = peft.get_peft_model(model, peft.LoraConfig(**options), autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def run_packed(arch, dtype, *, attn_impl=None, **options):
    compute = lambda model: prepare_model(model, attn_impl=attn_impl)(batch=packed())
    return run(compute, arch, dtype, **options)


@cache
def run_dense(arch, dtype, **options):
    compute = lambda model: torch.cat(
        [dense_token_logprob(model, p, y) for p, c, r in TRIPLES for y in (c, r)]
    )
    return run(compute, arch, dtype, **options)


def assert_same(packed, dense, tolerance):
    torch.testing.assert_close(packed[0], dense[0].to(packed[0].dtype), rtol=0, atol=tolerance)
    assert packed[1].keys() == dense[1].keys() and packed[1]
    for name, grad in dense[1].items():
        scale = grad.abs().max().clamp(min=1)  # a gradient sums over rows: relative to its size
        error = (packed[1][name] - grad).abs().max() / scale
        assert error <= tolerance, f"{name}: {error:.2e}"
