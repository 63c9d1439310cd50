"""The method without any of the tricks: one sequence at a time, every logit, plain masks."""

import numpy as np
import torch
from torch import Tensor


def random_triples(rng: np.random.Generator, *, pairs: int, vocab_size: int, longest: int = 9):
    """(prompt, chosen, rejected) token ids of random lengths >= 1."""
    draw = lambda: rng.integers(0, vocab_size, rng.integers(1, longest + 1)).astype(np.int32)
    return [(draw(), draw(), draw()) for _ in range(pairs)]


def dense_token_logprob(model, prompt: np.ndarray, response: np.ndarray) -> Tensor:  # (T,)
    """Log-probability of every response token from one ordinary pass over one sequence."""
    ids = torch.from_numpy(np.concatenate([prompt, response])).long()
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    logp = logits[:-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    return logp[len(prompt) - 1 :]
