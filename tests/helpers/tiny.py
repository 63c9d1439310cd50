"""Tiny random models of every architecture the tests run on: real classes, no download."""

import numpy as np
import torch
from plain_attention import EXACT
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sepo.data import ScoredPair

V = 61  # a prime: no tile size divides it

_COMMON = dict(vocab_size=V, bos_token_id=0, eos_token_id=1, pad_token_id=1)
_LLAMA_LIKE = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
CONFIGS = {
    "llama": dict(_LLAMA_LIKE, tie_word_embeddings=True),
    "qwen2": dict(_LLAMA_LIKE, tie_word_embeddings=False),
    "gpt_neox": dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    ),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=128),
    # windows short enough to hide tokens of the prompt from a response
    "mistral": dict(_LLAMA_LIKE, head_dim=8, sliding_window=4),
    "qwen3": dict(_LLAMA_LIKE, head_dim=16, tie_word_embeddings=True),
    # one layer with a window, one without; logits capped hard enough to matter
    "gemma2": dict(_LLAMA_LIKE, head_dim=8, sliding_window=5, attn_logit_softcapping=3.0),
}


def tiny_model(
    arch: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides
) -> PreTrainedModel:
    """A two-layer random model in eval mode. Weights are large enough that attention matters."""
    config = AutoConfig.for_model(
        arch, **{**_COMMON, **CONFIGS.get(arch, _LLAMA_LIKE), **overrides}
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if getattr(config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # where sdpa is the default it ignores the cap
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    if dtype == torch.float64:
        _norms_in_float64(model)
        if model.config._attn_implementation == "eager":  # softmax in float32
            model.set_attn_implementation(EXACT)
    return model.eval()


def _norms_in_float64(model: PreTrainedModel) -> None:
    """transformers' RMSNorms round to float32 inside, which would hide errors below 1e-7."""
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):
                gemma = type(norm).__name__.startswith("Gemma")
                exact = _ExactNorm(norm.weight.shape, norm.eps if gemma else norm.variance_epsilon)
                exact.weight, exact.offset = norm.weight, 1 if gemma else 0
                setattr(parent, name, exact)


class _ExactNorm(torch.nn.RMSNorm):
    def forward(self, x):
        return torch.nn.functional.rms_norm(
            x, self.normalized_shape, self.weight + self.offset, self.eps
        )


def tiny_tokenizer(offset: int = 0) -> PreTrainedTokenizerFast:
    """Words w0 to w60; another offset is another tokenizer of the same size."""
    words = {f"w{(i + offset) % V}": i for i in range(V)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1", unk_token="w0")


def random_scored_pairs(
    count: int, *, seed: int = 0, longest: int = 12, ties: bool = False
) -> list[ScoredPair]:
    """Pairs with scores and reference log-probabilities drawn at random."""
    rng = np.random.default_rng(seed)
    tokens = lambda: rng.integers(0, V, rng.integers(1, longest + 1)).astype(np.int32)
    draw = (lambda n: rng.integers(-4, 4, n)) if ties else (lambda n: rng.normal(size=n))
    floats = lambda y: draw(len(y)).astype(np.float32)
    pairs = []
    for i in range(count):
        prompt, chosen, rejected = tokens(), tokens(), tokens()
        pairs.append(
            ScoredPair(
                id=str(i),
                prompt=prompt,
                chosen=chosen,
                rejected=rejected,
                chosen_score=floats(chosen),
                rejected_score=floats(rejected),
                chosen_ref_logp=floats(chosen),
                rejected_ref_logp=floats(rejected),
            )
        )
    return pairs
