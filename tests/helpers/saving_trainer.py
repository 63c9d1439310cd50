"""A trainer that saves after every step."""

from tiny import random_scored_pairs, tiny_model

from sepo import SePOConfig, SePOTrainer

PAIRS = random_scored_pairs(12)


def make_trainer(path, *, pairs=PAIRS, eval_pairs=None, **args):
    defaults = dict(
        output_dir=str(path),
        pairs_per_step=4,
        save_strategy="steps",
        save_steps=1,
        disable_tqdm=True,
        use_cpu=True,
    )
    return SePOTrainer(tiny_model(), SePOConfig(**{**defaults, **args}), pairs, eval_pairs)
