"""TRL's DPOTrainer with SePO's loss and sepo's head, on a scored store.

    python examples/drop_in/trl_dpo.py MODEL runs/scored runs/policy

Its own loss on this head is `sepo.patch.HeadDPOTrainer`, with DPOTrainer's arguments as they are.
"""

import sys

from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig

from sepo.data.store import ScoredStore
from sepo.patch import MaskedPreferenceCollator, SelectedDPOTrainer, masked_pairs


def train(model: str, store: str, output: str, **arguments) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    args = DPOConfig(
        output, remove_unused_columns=False, precompute_ref_log_probs=True, **arguments
    )
    trainer = SelectedDPOTrainer(
        model,
        args=args,
        train_dataset=Dataset.from_list(list(masked_pairs(ScoredStore.open(store)))),
        processing_class=tokenizer,
        data_collator=MaskedPreferenceCollator(pad_token_id=tokenizer.eos_token_id),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    train(*sys.argv[1:], per_device_train_batch_size=8, learning_rate=5e-7)
