"""Count what a pair costs the trunk: its tokens, and an attention that is quadratic in them."""

from typing import Any

import numpy as np


def pair_costs(
    prompt: np.ndarray,  # (pairs,) tokens of the prompt
    chosen: np.ndarray,  # (pairs,) tokens to read of the chosen response
    rejected: np.ndarray,  # (pairs,) tokens to read of the rejected response
    *,
    attention: float,  # cost of one query and key over that of one token, see `attention_cost`
) -> np.ndarray:  # (pairs,) float64
    """Cost of each pair in tokens through the trunk, in the layout that stores the prompt once.

    Every prompt token attends to the prompt up to itself, every response token to the prompt and
    to its own response up to itself.
    """
    prompt, chosen, rejected = (np.asarray(x, np.float64) for x in (prompt, chosen, rejected))
    causal = lambda tokens: tokens * (tokens + 1) / 2  # queries and keys of one sequence
    area = causal(prompt + chosen) + causal(prompt + rejected) - causal(prompt)
    return prompt + chosen + rejected + attention * area


def attention_cost(
    config: Any,  # of a transformers decoder
    *,
    trunk_parameters: int,  # of one token's way: no embedding, no head, of experts the active ones
) -> float:
    """Cost of one (query, key) pair in all layers, over the cost of one token through the trunk.

    Counted in FLOP: 4 times the heads' width a layer (a product for the score, one for the value)
    against 2 a parameter; forward, backward and recomputation have the same ratio. A sliding
    window is not considered: the cost is then too high where a pair is longer than the window.
    """
    config = config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 4 * width * config.num_hidden_layers / (2 * trunk_parameters)


def attention_share(model: Any) -> float:  # a transformers model
    """`attention_cost` of a model; 0, so that tokens alone count, where shards hide its size."""
    parameters = model.get_decoder().num_parameters(exclude_embeddings=True)
    return attention_cost(model.config, trunk_parameters=parameters) if parameters else 0.0
