"""SePO's loss in a plain PyTorch loop on (B, T) labels, with -100 where a token is not selected.

The sequences of a batch alternate: chosen, rejected, chosen, ... `sepo.patch.collate_pairs` lays
them so. The model may be wrapped (DDP, FSDP2, ZeRO) after it is patched.
"""

import torch

import sepo.ops as ops
import sepo.patch


def pair_loss(model, batch: dict, *, gamma: float = 2.0, margin: float = 0.5) -> torch.Tensor:
    """Mean SePO loss of a batch of input_ids, attention_mask and labels, each (2 P, T)."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logp, cu_rows = model(selected_labels=batch["labels"], **inputs)
    return ops.sepo_loss(ops.segment_mean(logp, cu_rows), gamma=gamma, margin=margin).mean()


def train(model, batches, *, learning_rate: float = 5e-7) -> list[float]:
    """One pass over the batches; the loss of each."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=learning_rate), []
    with sepo.patch.transformers(model):
        for batch in batches:
            loss = pair_loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses
