"""The golden numbers once more, through the trainer: a causal model that has the fixture's logits.

The model is a random one whose head is solved for: seven rows of the packed buffer predict the
fixture's targets, and a head of more columns than that can give any logits there. Prompt and first
token are shared by the fixture's responses, its logits are not; so the first token is moved into
the responses, where it may differ, and the user's weights leave it out of the loss.
"""

import numpy as np
import pytest
import torch
from golden_losses import (
    CASES,
    GOLDEN,
    IDS,
    KL_MASK,
    ONES,
    REWARD_MASK,
    SELECTED,
    assert_golden_gradients,
    logits,
    plain,
)
from tiny import tiny_model

from sepo import SePOConfig, SePOTrainer
from sepo.data import TokenPair, pack
from sepo.data.segments import make_segments
from sepo.data.selection import Selection
from sepo.masks import layer_states
from sepo.model.forward import hidden_states
from sepo.model.prepare import prepare_model

F64 = dict(dtype=torch.float64)
V = 5
PROMPT = np.array([0], np.int32)
RESPONSES = [np.array([first, *ids[2:]], np.int32) for first, ids in zip((1, 0), IDS, strict=True)]
ROWS = [1, 2, 3, 4], [1, 2, 3]  # of the fixture's logits, those that predict a target


def pair(*, selected=None, swapped=False) -> TokenPair:
    """The fixture's pair; weights of 1 on its targets, or on those of `selected` alone."""
    weights = []
    for response, at in zip(RESPONSES, selected or ([0, 1, 2, 3], [0, 1, 2]), strict=True):
        weight = np.zeros(len(response), np.float32)
        weight[np.array(at) + 1] = 1
        weights.append(weight)
    order = (1, 0) if swapped else (0, 1)
    names = ("chosen", "rejected")
    sides = {name: RESPONSES[b] for name, b in zip(names, order, strict=True)}
    sides |= {f"{name}_weight": weights[b] for name, b in zip(names, order, strict=True)}
    return TokenPair(id="G", prompt=PROMPT, **sides)


def batch_of_all():
    return pack([make_segments(pair(), Selection("all"))])


def with_logits(arch: str, *, policy: bool):
    """A prepared model, and its states (7, D) at the rows that predict the fixture's targets."""
    width = 32 if policy else 48
    model = tiny_model(
        arch, seed=policy, vocab_size=V, hidden_size=width, tie_word_embeddings=False, **F64
    )
    prepare_model(model)
    batch = batch_of_all()
    with torch.no_grad():
        states = hidden_states(model, batch)[batch.rows]
        wanted = torch.cat([logits(b, policy=policy)[ROWS[b]] for b in (0, 1)])
        model.get_output_embeddings().weight.copy_((states.pinverse() @ wanted).T)
    assert torch.linalg.cond(states) < 1e3, "solving would cost the digits that are compared"
    return model, states


def open_mask(part, states, values):
    """Solve for the weights of a mask that gives these values at these states (L, 7, D)."""
    with torch.no_grad():
        centred = torch.nn.functional.layer_norm(states, states.shape[-1:])
        for weight, layer in zip(part.weight, centred, strict=True):
            weight.copy_(layer.pinverse() @ values)
        part.bias.zero_()
        part.mixer.fill_(1 / len(states))


# what each golden number is called in SePOConfig
SPARSE = dict(method="sparsepo", mask_l1=0.0, beta=0.1)
STEPS = {
    "dpo_beta0.1": dict(method="dpo", beta=0.1),
    "cdpo_beta0.1_ls0.1": dict(method="dpo", beta=0.1, label_smoothing=0.1),
    "ipo_sum_tau0.1": dict(method="ipo", beta=0.1, ipo_reduce="sum"),
    "ipo_mean_tau0.1": dict(method="ipo", beta=0.1),
    "simpo_beta2.0_ratio0.5": dict(method="simpo", beta=2.0, gamma_beta_ratio=0.5),
    "simpo_beta2.5_ratio0.55": dict(method="simpo", beta=2.5, gamma_beta_ratio=0.55),
    "tdpo1_beta0.1": dict(method="tdpo1", beta=0.1),
    "tdpo2_beta0.1_alpha0.5": dict(method="tdpo2", beta=0.1, tdpo2_alpha=0.5),
    "dpop_beta0.1_lambda50": dict(method="dpop", beta=0.1, dpop_lambda=50.0),
    "dpop_beta0.3_lambda5": dict(method="dpop", beta=0.3, dpop_lambda=5.0),
    "rrhf_rank_correct": dict(method="rrhf", sft_weight=0.0),
    "rrhf_rank_correct_swapped_pair": dict(method="rrhf", sft_weight=0.0),
    "rrhf_paper_total_sumNLL": dict(method="rrhf"),
    "rrhf_meanNLL_total": dict(method="rrhf", sft_reduce="mean"),
    "sparsepo_code_common_beta0.1": SPARSE,
    "sparsepo_code_indep_beta0.1": dict(SPARSE, independent_masks=True),
    "sparsepo_code_indep_beta0.1_l1_0.001": dict(SPARSE, independent_masks=True, mask_l1=0.001),
    "sparsepo_code_ones_beta0.1": SPARSE,
    "sparsepo_paper_common_beta0.1": dict(SPARSE, form="paper"),
    "sparsepo_paper_indep_beta0.1": dict(SPARSE, form="paper", independent_masks=True),
    "sparsepo_paper_ones_beta0.1": dict(SPARSE, form="paper"),
    "sepo_k0.5_gamma1_lambda0": dict(method="sepo", gamma=1.0, margin=0.0),
    "sepo_k0.5_gamma2_lambda0.5": dict(method="sepo", gamma=2.0, margin=0.5),
    "confpo_beta2.0_ratio0.5": dict(method="confpo", beta=2.0, gamma_beta_ratio=0.5),
    "confpo_beta1.5_gamma1.6": dict(method="confpo", beta=1.5, gamma_beta_ratio=1.6 / 1.5),
    "selective_dpo_beta0.1_q0.6": dict(method="selective-dpo", beta=0.1),
    "selective_dpo_beta0.1_q0.3": dict(method="selective-dpo", beta=0.1, selection_quantile=0.3),
}


def test_no_golden_number_is_left_out():
    assert STEPS.keys() == GOLDEN["loss"].keys()


@pytest.mark.parametrize("case", STEPS)
def test_golden_step(tmp_path, case):
    trainer, states = make_trainer(tmp_path, case)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(GOLDEN["loss"][case], abs=1e-9, rel=0)
    assert_golden_step(case, *descend(trainer, states))


@pytest.mark.parametrize("case", [c for c in STEPS if c.startswith("sparsepo") and "common" in c])
def test_golden_step_of_an_activation_mask(tmp_path, monkeypatch, case):
    """MaPO is SparsePO's loss with another mask: with the fixture's it has its numbers."""
    mask = lambda activations, cu_rows, norm: REWARD_MASK[: activations.shape[1]]
    monkeypatch.setattr("sepo.masks.kinds.activation_mask", mask)
    trainer, states = make_trainer(tmp_path, case, method="mapo")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(GOLDEN["loss"][case], abs=1e-9, rel=0)
    assert_golden_step(case, *descend(trainer, states))


def make_trainer(tmp_path, case, **more):
    policy, states = with_logits("llama", policy=True)
    data = [pair(selected=SELECTED if "sepo_k" in case else None, swapped="swapped" in case)]
    plain_descent = dict(
        optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", warmup_steps=0,
        max_grad_norm=0.0, mask_weight_decay=0.0, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    options = STEPS[case] | plain_descent | more
    trainer = SePOTrainer(
        policy,
        SePOConfig(output_dir=str(tmp_path), use_cpu=True, **options),
        train_dataset=data,
        eval_dataset=data,
        reference_model=with_logits("gpt_neox", policy=False)[0],
    )
    if trainer.mask is not None:
        of_layers = layer_states(trainer.reference.model, batch_of_all())[1]
        open_mask(trainer.mask.reward, of_layers, ONES if "ones" in case else REWARD_MASK)
        if trainer.mask.kl is not None:
            open_mask(trainer.mask.kl, of_layers, KL_MASK)
    return trainer, states


def descend(trainer, states):
    """One step of gradient descent at rate 1; what it says the gradient of the logits was."""
    head = trainer.model.get_output_embeddings().weight
    before = head.detach().clone()
    trainer.train()
    assert trainer.state.global_step == 1
    grad_head = before - head.detach()  # (V, D) = grad_logits.T @ states
    grad_logits = (grad_head @ states.pinverse()).T  # (7, V)
    # nothing of it comes from any other row
    torch.testing.assert_close(grad_logits.T @ states, grad_head, rtol=0, atol=1e-9)
    return grad_logits.split([4, 3])


def assert_golden_step(case, *found):
    grads = []
    for b, of_rows in enumerate(found):
        grad = torch.zeros(len(IDS[b]), V, **F64)
        grad[ROWS[b]] = of_rows
        grads.append(grad)
    assert_golden_gradients(case, *grads)
    # the fixture says two rows and a sum; the plain formula, which agrees with it, says all
    both = [logits(b, policy=True).requires_grad_() for b in (0, 1)]
    expected = torch.autograd.grad(CASES[case](plain, both).sum(), both)
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-9)
