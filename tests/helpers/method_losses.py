"""The loss of each method with its gradients: of the packed step, and of the dense definition."""

from dataclasses import replace
from functools import cache

import torch
from dense import dense_losses
from tiny import V, random_scored_pairs, tiny_model

from sepo import SePOConfig
from sepo.data import ScoredPair, pack
from sepo.masks import SparseMask
from sepo.model.prepare import prepare_model
from sepo.model.reference import LiveReference
from sepo.trainer.methods import METHODS, reduce_segments
from sepo.trainer.pairs import PreparedPairs
from sepo.trainer.step import step_reads

F64 = dict(dtype=torch.float64)
# of another architecture and width than the policy
WIDE = dict(hidden_size=48, num_hidden_layers=3, tie_word_embeddings=False, seed=1)
REFERENCE_ARCH = {"llama": "gpt_neox", "gpt_neox": "llama"}


@cache
def arguments(method: str, **options) -> SePOConfig:
    defaults = dict(gamma=2.0, margin=0.5, beta=0.7, label_smoothing=0.1, seed=5)
    return SePOConfig(output_dir="-", use_cpu=True, method=method, **(defaults | options))


def scored_pairs(seed: int) -> list[ScoredPair]:
    """One to four pairs; whole-numbered scores, so that ties are common."""
    return random_scored_pairs(1 + seed % 4, seed=seed, longest=9, ties=True)


def packed_loss(model, reference, pairs, args, *, together=True):
    """What the trainer computes of these pairs: in one micro-batch, or in one a pair."""
    prepare_model(model)
    method, live = METHODS[args.method], None
    if reference is not None:
        live = LiveReference(prepare_model(reference))
    prepared, losses = PreparedPairs(pairs, args), []
    for part in [list(prepared)] if together else [[pair] for pair in prepared]:
        batch = pack(part)
        tokens = model(batch=batch, reads=step_reads(method, args, live))
        losses.append(method.loss(reduce_segments(tokens, batch.weights, batch.cu_rows), args))
    return torch.cat(losses).sum()


def dense_loss(model, pairs, method, fraction):
    """The definition, of a method whose reference is in the pairs."""
    return dense_losses(model, None, pairs, arguments(method, fraction=fraction)).sum()


def loss_and_gradients(compute, arch, *args, mask=None, **options):
    model = tiny_model(arch, **F64)
    if mask is not None:
        model.sparse_mask = mask()
    loss = compute(model, *args, **options)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_equal(found, expected):
    (loss, grads), (dense, dense_grads) = found, expected
    torch.testing.assert_close(loss, dense, rtol=1e-10, atol=1e-10)
    for name, expected in dense_grads.items():
        found = grads[name]
        expected = torch.zeros_like(found) if expected is None else expected
        torch.testing.assert_close(
            found, expected, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


def dense_loss_sum(*args):
    return dense_losses(*args).sum()


# Every method, and every choice that changes its step
STEPS = {
    **{method: {} for method in METHODS},
    "ipo sum": dict(ipo_reduce="sum"),
    "selective-dpo few": dict(selection_quantile=0.9),
    "selective-dpo recomputed": dict(head_budget=8 * V * 8),
    "sepo-entropy few": dict(fraction=0.1),
    "sepo-entropy recomputed": dict(head_budget=8 * V * 8),
    "confpo recomputed": dict(head_budget=8 * V * 8),
    "rrhf mean": dict(sft_reduce="mean", sft_weight=0.25),
    "tdpo1 recomputed": dict(head_budget=8 * V * 8),
    "sparsepo paper": dict(form="paper"),
    "sparsepo independent": dict(independent_masks=True),
    "sparsepo independent paper": dict(independent_masks=True, form="paper", mask_layernorm=False),
    "sparsepo binary": dict(mask_kind="binary", independent_masks=True),
    # its norm is a constant, and a sum in float32
    "sparsepo random": dict(mask_kind="random", mask_l1=0.0, kl_mask_l1=0.0),
    "mapo paper": dict(form="paper"),
    "mapo zscore": dict(mask_norm="zscore"),
}
OPTIONS = dict(dpop_lambda=3.0, mask_l1=0.03, kl_mask_l1=0.07, fraction=0.5)


def step_arguments(name: str) -> SePOConfig:
    return arguments(name.split()[0], **(OPTIONS | STEPS[name]))


def without_cache(pairs: list[ScoredPair]) -> list[ScoredPair]:
    return [replace(pair, chosen_ref_logp=None, rejected_ref_logp=None) for pair in pairs]


@cache
def reference_of(arch: str, reader: str):
    """One for packed and one for dense passes: a prepared model attends in its own way."""
    return tiny_model(REFERENCE_ARCH[arch], **WIDE, **F64)


def mask_for(reference, args) -> SparseMask:
    """Weights large enough that some tokens are shut and others far from it."""
    options = dict(independent=args.independent_masks, layernorm=args.mask_layernorm)
    config = reference.config
    mask = SparseMask(
        config.num_hidden_layers, config.hidden_size, binary=args.mask_kind == "binary", **options
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in mask.double().parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, **F64))
    return mask
