"""The function of tensors that stands where TRL has its distillation's."""

import math
from typing import Any

import torch
from torch import Tensor

import sepo.ops as ops
from sepo.model.forward import Head
from sepo.patch._trl_head import head_of, refuse_zero3

ENDS = {0.0: "ref||policy", 1.0: "policy||ref"}  # of beta


class Divergence:
    """Stand where TRL has its autograd function; its `apply` takes and returns the same."""

    @staticmethod
    def apply(
        hidden: Tensor,  # (M, D) of the student
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        teacher_hidden: Tensor,  # (M, D_teacher)
        teacher_weight: Tensor,  # (V, D_teacher)
        teacher_bias: Tensor | None,  # (V,)
        beta: float,
        temperature: float = 1.0,
        scale: float = 1.0,
        softcap: float | None = None,
        teacher_scale: float = 1.0,
        teacher_softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:  # (M,) float32 nats each
        """Return every row's divergence, and the student's entropy without a gradient.

        KL(teacher || student) at beta 0, KL(student || teacher) at 1, between them the generalised
        Jensen-Shannon divergence of GKD (arXiv 2306.13649).
        """
        refuse_zero3()
        dtype = torch.promote_types(hidden.dtype, teacher_hidden.dtype)
        x, (weight, bias, scale, softcap) = head_of(
            hidden.to(dtype), Head(weight, bias, scale, softcap), temperature
        )
        y, teacher_head = head_of(
            teacher_hidden.to(dtype),
            Head(teacher_weight, teacher_bias, teacher_scale, teacher_softcap),
            temperature,
        )
        rows = torch.arange(len(x), dtype=torch.int32, device=x.device)
        targets = torch.zeros(len(x), dtype=torch.int64, device=x.device)  # nobody reads their logp
        logits: dict[str, Any] = dict(bias=bias, scale=scale, softcap=softcap)
        kl = ops.selected_logprob_kl(
            x,
            weight,
            y,
            teacher_head.weight,
            rows,
            targets,
            direction=ENDS.get(beta, ("jsd", beta)),
            ref_bias=teacher_head.bias,
            ref_scale=teacher_head.scale,
            ref_softcap=teacher_head.softcap or math.inf,
            **logits,
        ).kl
        with torch.no_grad():
            entropy = ops.selected_stats(x, weight, rows, targets, **logits).entropy
        return kl.float(), entropy.float()
