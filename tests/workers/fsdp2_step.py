"""Two ranks, models sharded with torch's own fully_shard: the step's gradients, saved by rank 0.

It shards the head on its own, which accelerate never does.
"""

import os

import torch
from tiny import random_scored_pairs, tiny_model
from torch.distributed.fsdp import fully_shard

from sepo import SePOConfig, SePOTrainer

HEADS = ("tied", "untied", "own_head")


def main(out: str) -> None:
    args = SePOConfig(
        output_dir=out, use_cpu=True, disable_tqdm=True, pairs_per_step=7, max_tokens_per_batch=40
    )
    found = {head: step(args, head) for head in HEADS}
    if args.process_index == 0:
        torch.save(found, f"{out}/steps.pt")
    torch.distributed.barrier()
    # the results are on disk; FSDP2 keeps gloo's threads alive, and an interpreter that shuts down
    # under them now and then aborts ("terminate called without an active exception")
    os._exit(0)


def step(args: SePOConfig, head: str) -> dict:
    model = tiny_model("llama", tie_word_embeddings=head == "tied")
    trainer = SePOTrainer(model, args, random_scored_pairs(7))
    for layer in model.model.layers:
        fully_shard(layer)
    if head == "own_head":
        fully_shard(model.lm_head)
    fully_shard(model)
    loss = trainer.training_step(model, {})
    torch.distributed.all_reduce(loss)
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return {"loss": loss / args.world_size, "gradients": gradients}
