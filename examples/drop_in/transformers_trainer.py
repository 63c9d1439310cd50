"""transformers' Trainer with SePO's loss and sepo's head, on pairs from `minus_100.py`.

python examples/drop_in/transformers_trainer.py MODEL selected.jsonl runs/policy
"""

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainingArguments

from sepo.patch import PairTrainer, collate_pairs


def train(model: str, data: str, output: str, **arguments) -> None:
    trainer = PairTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        TrainingArguments(output, remove_unused_columns=False, **arguments),
        train_dataset=Dataset.from_json(data),
        data_collator=collate_pairs,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    train(*sys.argv[1:], per_device_train_batch_size=8, learning_rate=5e-7)
