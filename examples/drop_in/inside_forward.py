"""`selected_logprob` inside a model's own forward, for trainers that wrap the model.

A head that is read outside the wrapped forward passes DDP's, FSDP2's and ZeRO's hooks by: gradients
that nobody averages, or a weight that is not there.
"""

import functools

import torch
from torch import Tensor

import sepo.ops as ops
from sepo.model import head


def add_selected_logprob(model) -> None:
    """Make model(..., selected_labels=labels) return logp (M,) and cu_rows (B + 1,).

    Any other call is as it was. The model may be a PeftModel.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = model.forward

    @functools.wraps(own)  # Trainer reads from the signature which columns a model wants
    def forward(*args, selected_labels=None, **kwargs):
        if selected_labels is None:
            return own(*args, **kwargs)
        return selected_logprob(model, selected_labels, *args, **kwargs)

    model.forward = forward


def selected_logprob(
    model,
    labels: Tensor,  # (B, T) int64, -100 where a token is not selected
    *args,
    **kwargs,  # of the trunk: input_ids, attention_mask
) -> tuple[Tensor, Tensor]:  # logp (M,) float32, cu_rows (B + 1,) int32
    """Log-probability of every label that isn't -100; sequence b is segment b."""
    kwargs["use_cache"] = False
    hidden = model.get_decoder()(*args, **kwargs).last_hidden_state.flatten(0, 1)  # (B T, D)
    weight, bias, scale, softcap = head(model)
    if torch.is_autocast_enabled(hidden.device.type):  # autocast itself stops at the operation
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    rows, targets, cu_rows = ops.rows_from_labels(labels)
    logp = ops.selected_logprob(
        hidden, weight, rows, targets, bias=bias, scale=scale, softcap=softcap
    )
    return logp, cu_rows
