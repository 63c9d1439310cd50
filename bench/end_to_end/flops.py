"""FLOP that a model has to compute for a set of pairs, and what the machine could do at most."""

import re

import torch
from transformers import PreTrainedModel

# dense bfloat16 products, from the vendor's data sheets
PEAK = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


def training(
    model: PreTrainedModel,
    sizes: list[tuple[int, int, int]],  # tokens read of prompt, chosen, rejected
    rows: int,  # through the head
    *,
    prompt_once: bool,
    forwards: int = 0,  # further passes without a backward: a live reference
    heads: int = 0,  # further products with the head alone: a reference's cached rows
) -> float:
    """Two FLOP a weight and token forward, twice that backward; attention over its causal half.

    Neither padding nor logits of rows that the loss does not use, nor what is computed again: so a
    utilisation made from it falls with all three.
    """
    config = model.config.get_text_config(decoder=True)
    outer = {id(x.weight) for x in (model.get_input_embeddings(), model.get_output_embeddings())}
    weights = sum(p.numel() for p in model.parameters() if id(p) not in outer and p.ndim > 1)
    copies = 1 if prompt_once else 2
    tokens = sum(copies * p + c + r for p, c, r in sizes)
    seen = 0  # pairs of a query and a key
    for p, c, r in sizes:
        sequence = lambda n: n * (n + 1) // 2
        seen += sequence(p + c) + sequence(p + r) - (sequence(p) if prompt_once else 0)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * width * seen
    head = 2 * rows * config.hidden_size * config.vocab_size
    return (3 + forwards) * float(2 * weights * tokens + attention + head) + heads * head


def peak() -> float | None:
    """Of this machine's GPU; None for one that is not in the table."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK.items() if re.search(rf"\b{part}\b", name)), None)
