"""An epoch over the same pairs that others ran, with the time that they published.

alignment-handbook/zephyr-7b-dpo-full on the Hugging Face hub: train_results.json at revision b227adb
has the seconds, README.md at c1a1250 the numbers of GPUs and pairs, the handbook's recipe
(recipes/zephyr-7b-beta, "8 GPUs (80GB of VRAM)") ZeRO-3 and checkpointing. Nobody says which GPUs.
"""

from dataclasses import dataclass

import numpy as np

from sepo.cost import paper
from sepo.cost.decoder import named
from sepo.cost.gpu import GPU, hours, hours_at_full_rate
from sepo.cost.work import Schedule, Work, scaled, step_work


@dataclass(frozen=True)
class PublicRun:
    """Padded rows, every logit, layers made again, a live reference."""

    name: str
    model: str  # a shape
    seconds: float  # of the training loop, its evaluations included
    gpus: int
    pairs_at_once: int  # on each GPU
    pairs_per_step: int
    max_length: int  # tokens of a prompt and one response
    max_prompt_length: int

    @property
    def hours(self) -> float:  # GPU-hours
        return self.seconds * self.gpus / 3600

    def modelled(self, gpu: GPU) -> float:  # GPU-hours
        return hours(self._work(), gpu)

    def share_of_the_rate(self, gpu: GPU) -> float:
        """Divide the time that the model needs at the GPU's full rate by the time that was taken."""
        return hours_at_full_rate(self._work(), gpu) / self.hours

    def _work(self) -> Work:
        pairs = paper.data(self.model)
        sizes = pairs.whole.copy()
        sizes[:, 0] = np.minimum(sizes[:, 0], self.max_prompt_length)
        sizes[:, 1:] = np.minimum(sizes[:, 1:], self.max_length - sizes[:, :1])
        work = step_work(
            named(self.model), sizes, float(sizes[:, 1:].sum()), SCHEDULE,
            pairs_at_once=self.pairs_at_once, gathered_over=self.gpus,
            steps=len(sizes) / self.pairs_per_step,
        )  # fmt: skip
        return scaled(work, pairs.scale)


SCHEDULE = Schedule(
    packed=False, prompt_once=False, selected=False, checkpointing=True, reference="live"
)
ZEPHYR = PublicRun("zephyr-7b-dpo-full", "Mistral-7B", 5328.4749, 8, 8, 128, 1024, 512)
