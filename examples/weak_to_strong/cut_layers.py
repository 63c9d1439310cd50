"""Keep the first layers of a checkpoint: a smaller model of the same family, broken until repaired.

    python examples/weak_to_strong/cut_layers.py --model runs/smollm2 --layers 10 --out runs/cut

Embeddings, the final norm, the head and the tokenizer stay as they are. The final norm and the head
have only ever read the last layer's output, so the cut model predicts badly until it is trained.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sepo.errors import InputError, exit_with_one_line


def main() -> None:
    args = parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    cut_layers(model, args.layers).save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)
    print(f"{args.out}: {args.layers} layers, {model.num_parameters() / 1e6:.0f} M parameters")


def cut_layers(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """The model itself with its first `count` decoder layers. Raises InputError for other counts."""
    decoder = model.get_decoder()
    total = model.config.num_hidden_layers
    if not 0 < count < total:
        raise InputError(f"--layers: expected a number from 1 to {total - 1}, got {count}")
    decoder.layers = decoder.layers[:count]
    model.config.num_hidden_layers = count
    if getattr(model.config, "layer_types", None):  # one name a layer, checked when it is loaded
        model.config.layer_types = model.config.layer_types[:count]
    return model


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="hub id or local path")
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    exit_with_one_line(main)
