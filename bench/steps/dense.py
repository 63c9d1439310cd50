"""TDPO2 and SparsePO written straightforwardly, as their released code does it, without its slips.

Chosen and rejected responses are one batch, each after its prompt, padded to the longest. Policy and
reference (no_grad) run the model's own forward with sdpa attention and put out all logits (2P, L, V);
both are made float32 and log-softmaxed; the target's entry is gathered and the KL divergence summed
over the vocabulary. SparsePO's mask reads all layers by output_hidden_states. What is no longer
needed is let go of at once, and the last position, which predicts nothing, is left out.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import plain
from bench.contender import Contender
from bench.steps import work
from bench.steps.inputs import Truth
from bench.steps.models import Weights, checkpoint_layers, num_bytes, twin
from bench.steps.objectives import MASK_L1, SETTINGS
from sepo.data.types import TokenPair
from sepo.trainer.step import MASK


def step_loss(objective: str, policy: nn.Module, reference: nn.Module, pairs: list[TokenPair]):
    """Mean over the pairs, with a gradient."""
    ids, attention = plain.padded(pairs, policy.device)
    used = responses(pairs, ids)  # (2P, L - 1)
    targets = ids[:, 1:]
    masked = objective == "sparsepo"
    with torch.no_grad():
        ref_all, states = plain.vocabulary_logp(
            reference, ids, attention, output_hidden_states=masked
        )
    all_logp, _ = plain.vocabulary_logp(policy, ids, attention)
    kl = plain.divergence(all_logp, ref_all, "ref||policy")  # (2P, L - 1)
    ratio = plain.of_targets(all_logp, targets) - plain.of_targets(ref_all, targets)
    # (P,) chosen, (P,) rejected
    total = lambda values: (values * used).sum(1).view(-1, 2).unbind(1)
    if masked:
        mask = learned_mask(getattr(policy, MASK).reward, [state[:, :-1] for state in states])
        return sparsepo(total(mask * ratio), total(mask * kl), total(mask)).mean()
    return tdpo2(total(ratio), total(kl)).mean()


def responses(pairs: list[TokenPair], ids: Tensor) -> Tensor:  # (2P, L - 1) float32
    """1 where the next token is one of the response, 0 in prompt and padding."""
    used = torch.zeros(len(ids), ids.shape[1] - 1)
    sizes = [(len(p.prompt) - 1, len(y)) for p in pairs for y in (p.chosen, p.rejected)]
    for row, (start, length) in zip(used, sizes, strict=True):
        row[start : start + length] = 1
    return used.to(ids.device)


def learned_mask(mask: nn.Module, states: list[Tensor]) -> Tensor:  # -> (2P, L - 1) float32
    """A score a layer, mixed: of all positions, as everything here; embeddings are no layer."""
    norm = mask.norm
    layers = [
        F.linear(norm(state), weight[None], bias[None]).relu()
        for state, weight, bias in zip(states[1:], mask.weight, mask.bias, strict=True)
    ]
    return F.linear(torch.cat(layers, -1), mask.mixer[None]).relu()[..., 0].float()


def tdpo2(ratio: tuple[Tensor, Tensor], kl: tuple[Tensor, Tensor]) -> Tensor:  # (P,)
    """eq. 17 of arXiv 2404.11999; chosen and rejected are (P,) each."""
    beta, alpha = SETTINGS["tdpo2"]["beta"], SETTINGS["tdpo2"]["alpha"]
    margin = (ratio[0] - ratio[1]) - alpha * (kl[1] - kl[0].detach())
    return -F.logsigmoid(beta * margin)


def sparsepo(
    ratio: tuple[Tensor, Tensor], kl: tuple[Tensor, Tensor], norm: tuple[Tensor, Tensor]
) -> Tensor:  # (P,)
    """The code of arXiv 2410.05102 with one mask: it pays its L1 norm as a reward's and as a KL's."""
    margin = (ratio[0] - ratio[1]) + (kl[0] - kl[1])
    return -F.logsigmoid(SETTINGS["sparsepo"]["beta"] * margin) + 2 * MASK_L1 * (norm[0] + norm[1])


def truth(objective: str, weights: Weights, pairs: list[TokenPair]) -> Truth:
    """The same in float32, a pair at a time: no pair sees the padding of another."""
    model, reference, value = weights.twin(), twin(weights.reference), 0.0
    for pair in pairs:
        loss = step_loss(objective, model, reference, [pair]) / len(pairs)
        loss.backward()
        value += loss.item()
    return Truth(value, weights.take_gradients())


def contenders(
    objective: str, weights: Weights, rounds: list[list[TokenPair]], *, bf16: bool
) -> list[Contender]:
    args = objective, weights, rounds, bf16
    return [_contender(*args), replace(_contender(*args, True), rounds=0)]


def _contender(
    objective: str, weights: Weights, rounds: list, bf16: bool, checkpointing: bool = False
) -> Contender:  # with checkpointing its memory alone is asked for
    policy, reference = weights.twin(), twin(weights.reference)
    if checkpointing:
        checkpoint_layers(policy)
    forward = lambda number: step_loss(objective, policy, reference, rounds[number])
    step = plain.Step(forward, lambda value: value, policy.device, bf16)
    return Contender(
        f"dense {objective}" + (", checkpointing" if checkpointing else ""), step,
        objective=objective, group="dense", lower=step.lower, keeps_bytes=num_bytes(reference),
        work=lambda number: work.padded(policy, rounds[number], live=True),
        note=lambda inputs: "tokens and rows once more by the reference",
    )  # fmt: skip
