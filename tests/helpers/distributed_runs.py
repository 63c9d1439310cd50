"""One run that any number of processes and any sharding of the weights train alike."""

import torch
from safetensors.torch import load_file

RUN = dict(
    pairs=11,
    eval_pairs=1,  # one rank has none
    eval_strategy="epoch",
    pairs_per_step=5,  # 5, 5 and 1: in the last step one rank has no pair
    num_train_epochs=2,
    warmup_steps=0,
    learning_rate=0.05,
    optim="sgd",  # AdamW divides rounding by rounding where a gradient is nearly zero
    max_grad_norm=0.5,  # less than the gradients' norms: it always cuts
    save_strategy="no",
    logging_steps=1,
)
MODELS = {"tied": {}, "untied": dict(tie_word_embeddings=False)}


def assert_same_weights(found, expected, start):
    """Every weight moved, and to the same place but for the last bit of the largest."""
    found, expected, start = (load_file(p / "model.safetensors") for p in (found, expected, start))
    assert found.keys() >= expected.keys()
    for name in found.keys() - expected.keys():  # DeepSpeed saves a tied weight twice
        assert torch.equal(found[name], found["model.embed_tokens.weight"]), name
    for name, weight in expected.items():
        rounding = torch.finfo(weight.dtype).eps * weight.abs().max().item()
        moved = (weight - start[name]).abs().max().item()
        assert moved > 1000 * rounding, name
        # of what moved little 1e-4 may be less than the distance of two float32 numbers there
        unit = torch.finfo(weight.dtype).eps * 2.0 ** weight.abs().max().log2().floor().item()
        atol = max(min(rounding, 1e-4 * moved), unit)
        torch.testing.assert_close(found[name], weight, rtol=0, atol=atol, msg=name)
