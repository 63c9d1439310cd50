"""How micro-batches reach the device: packed with what its attention reads, one copy, one ahead."""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from functools import partial
from itertools import chain, count

import torch
from torch import nn

from sepo.attention import Terms, with_arrays
from sepo.data.types import PackedBatch
from sepo.model.ahead import ahead
from sepo.model.prepare import attention_needs

Batches = Generator[PackedBatch, None, None]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}  # by accelerate's word for autocast to it


def feed(
    packs: Iterable[Callable[[], PackedBatch]],  # each makes one on the CPU
    device: torch.device,
    models: Iterable[nn.Module],  # that read them, prepared, in the mode they will be in
    *,
    mixed_precision: str | None = None,  # accelerate's word
) -> Batches:
    """The batches on `device`, in order. Close what is not exhausted.

    Where a device computes, a thread makes the next batch meanwhile: pairs are read, selected, cut
    and laid out, attention's arrays made, all of it pinned. The error of a batch is raised in its
    place. On a CPU a batch is made when it is asked for: nothing there is idle.
    """
    if not works_ahead(device):
        return (pack().to(device) for pack in packs)
    dtype = DTYPES.get(mixed_precision or "no")
    needs = [need for model in models for need in attention_needs(model, dtype=dtype)]
    return _ahead(packs, device, needs)


def works_ahead(device: torch.device) -> bool:
    """Whether the host has time to make the next batch while this one runs."""
    return device.type != "cpu"


def _ahead(packs, device: torch.device, needs: Sequence[tuple[str, Terms]]) -> Batches:
    ready = lambda pack: with_arrays(pack(), needs).pin()
    with closing(ahead(partial(ready, pack) for pack in packs)) as batches:
        for batch in batches:
            yield batch.to(device)


class StepFeed:
    """Batches of one step after the other: a step's first is made while the step before runs."""

    def __init__(
        self,
        parts_of: Callable[[int], Iterable],  # step -> what its batches are made of
        batches_of: Callable[[Iterable], Batches],
    ):
        self._parts_of, self._batches_of = parts_of, batches_of
        self._batches: Batches | None = None
        self._next_step: int | None = None

    def of(self, step: int, last: int) -> Batches:
        """Batches from `step` on, of which the step takes its own; none is made beyond step `last`."""
        # the first, or not where the step before had got to
        if self._batches is None or step != self._next_step:
            self.close()
            steps = range(step, last) if step < last else count(step)
            self._batches = self._batches_of(chain.from_iterable(map(self._parts_of, steps)))
        self._next_step = step + 1
        return self._batches

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()
        self._batches, self._next_step = None, None
