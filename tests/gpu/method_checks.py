"""A micro-batch of each method that reads a reference's distribution; a function of the device."""

from functools import cache

import torch
from numerics import assert_as_accurate
from tiny import random_scored_pairs, tiny_model

from sepo import SePOConfig
from sepo.data import pack
from sepo.masks import SparseMask, num_layers
from sepo.model.prepare import prepare_model
from sepo.model.reference import LiveReference
from sepo.trainer.methods import METHODS, reduce_segments
from sepo.trainer.pairs import PreparedPairs
from sepo.trainer.step import MASK, step_reads

CASES = {
    "tdpo1": {},
    "tdpo2": {},
    "sparsepo": {},
    "sparsepo, paper": dict(form="paper", independent_masks=True),
    "mapo": {},
}
PAIRS = random_scored_pairs(7)


def micro_batch(case: str, device: str, dtype: torch.dtype):
    """A function that runs forward and backward, and gives loss and gradients by name."""
    name, options = case.partition(",")[0], CASES[case]
    args = SePOConfig(output_dir="-", use_cpu=True, method=name, beta=0.7, **options)
    method = METHODS[name]
    # drawn in float32: another dtype would draw other weights
    model = tiny_model().to(device, dtype)
    frozen = tiny_model("gpt_neox", seed=1).to(device, dtype).requires_grad_(False)
    reference = LiveReference(prepare_model(frozen, attn_impl="sdpa"))
    if method.mask == "learned":
        torch.manual_seed(0)
        mask = SparseMask(num_layers(frozen), 32, independent=args.independent_masks)
        for p in mask.parameters():  # as drawn it is nearly shut
            torch.nn.init.normal_(p, mean=0.2)
        setattr(model, MASK, mask.to(device, dtype))
    prepare_model(model, attn_impl="sdpa")
    batch = pack(list(PreparedPairs(PAIRS, args))).to(device)

    def run():
        model.zero_grad()
        tokens = model(batch=batch, reads=step_reads(method, args, reference))
        loss = method.loss(reduce_segments(tokens, batch.weights, batch.cu_rows), args).sum()
        loss.backward()
        return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()}

    return run


@cache
def expected(case: str) -> tuple[dict, dict]:
    """In float32 and in float64 on the CPU."""
    return tuple(micro_batch(case, "cpu", dtype)() for dtype in (torch.float32, torch.float64))


def agrees(case: str, device: str) -> None:
    """float32 on the device errs at most four times as much as on the CPU."""
    baseline, truth = expected(case)
    for name, found in micro_batch(case, device, torch.float32)().items():
        assert_as_accurate(
            found.cpu(), baseline[name], truth[name].double(), what=f"{case} {name}", factor=4.0
        )
