"""SePO's loss in a plain PyTorch loop on (B, T) labels, with -100 where a token is not selected.

The sequences of a batch alternate: chosen, rejected, chosen, ... `minus_100.py` makes such labels.
In a wrapped model (DDP, FSDP2, ZeRO) the head belongs inside its forward: `inside_forward.py`.
"""

import torch

import sepo.ops as ops
from sepo.model import head


def pair_loss(model, batch: dict, *, gamma: float = 2.0, margin: float = 0.5) -> torch.Tensor:
    """Mean SePO loss of a batch of input_ids, attention_mask and labels, each (2 P, T)."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state  # (2 P, T, D)
    weight, bias, scale, softcap = head(model)
    rows, targets, cu_rows = ops.rows_from_labels(batch["labels"])
    logp = ops.selected_logprob(
        hidden.flatten(0, 1), weight, rows, targets, bias=bias, scale=scale, softcap=softcap
    )
    return ops.sepo_loss(ops.segment_mean(logp, cu_rows), gamma=gamma, margin=margin).mean()


def train(model, batches, *, learning_rate: float = 5e-7) -> list[float]:
    """One pass over the batches; the loss of each."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=learning_rate), []
    for batch in batches:
        loss = pair_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
