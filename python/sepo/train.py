"""The training script: `sepo train`, `python -m sepo.train`, `torchrun -m sepo.train`.

Arguments are SePOConfig's, on the command line or in `--config run.yaml`; the command line wins.
"""

from sepo.errors import InputError, exit_with_one_line, in_one_line, needs
from sepo.system.settings import check_settings

if __name__ == "__main__":
    with in_one_line():  # before the imports that read the environment
        check_settings()
        with needs("train", "sepo train"):
            import sepo.trainer  # noqa: F401

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from sepo.data.read.load import default_split
from sepo.data.store.store import ScoredStore, is_store
from sepo.data.types import TokenPair
from sepo.flags.options import say_idle
from sepo.flags.reading import read_data
from sepo.model.folder import ModelFolder, find_folder
from sepo.model.load import load_model, load_tokenizer
from sepo.model.prepare import explain_attention
from sepo.model.reference import ReferenceFolder
from sepo.system.lock import contents, lock
from sepo.terminal import release_warnings, say
from sepo.trainer.adapters import lora_config, quantization_config
from sepo.trainer.arguments import needed, parse
from sepo.trainer.checkpoints import completed_step
from sepo.trainer.config import SePOConfig
from sepo.trainer.inherited import given_of
from sepo.trainer.methods import METHODS
from sepo.trainer.resume import of_rank_0
from sepo.trainer.trainer import SePOTrainer


def main(argv: list[str] | None = None) -> None:
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.should_log:
        say_idle(unread_flags(args))
    if args.fsdp and args.world_size == 1:
        raise InputError("--fsdp: expected ranks to shard over (torchrun), got one process")
    with ExitStack() as held:
        of_rank_0(args, lambda: hold_output_dir(args, held))
        train(args)


def train(args: SePOConfig) -> None:
    """Everything from the data to the saved model, in an output directory that is held."""
    adapters, quantised = lora_config(args), quantization_config(args)
    policy = find_policy(args)
    tokenizer = load_tokenizer(policy.path, trust_remote_code=args.trust_remote_code)
    dataset = needed(args, "dataset_name")
    data = {dataset: load_pairs(dataset, args.dataset_split, tokenizer, args)}
    if args.eval_dataset_name is not None:
        name = args.eval_dataset_name
        split = args.eval_dataset_split or default_split(name, "test")
        data[f"{name} (to evaluate)"] = load_pairs(name, split, tokenizer, args)
    pairs, *eval_pairs = data.values()
    reference = None
    if METHODS[args.method].reference is not None:
        reference = find_reference(args, policy, data, tokenizer)
    model = load_model(
        policy,
        dtype=getattr(torch, args.dtype),
        attn_impl=args.attn_impl,
        quantization_config=quantised,
    )
    trainer = SePOTrainer(
        model,
        args,
        train_dataset=pairs,
        eval_dataset=eval_pairs[0] if eval_pairs else None,
        processing_class=tokenizer,
        reference_model=reference,
        peft_config=adapters,
    )
    if args.should_log:
        print(f"attention: {explain_attention(trainer.model, dtype=compute_dtype(args))}")
        for what, why in trainer.explained.items():
            print(f"{what}: {why}")
    release_warnings()
    trainer.train(resume_from_checkpoint=resume_argument(args))
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        print(f"{args.method}: {trainer.state.global_step} steps, model in {args.output_dir}")


def find_policy(args: SePOConfig) -> ModelFolder:
    """Find and print what the policy's folder holds. Raises InputError for what can't be trained."""
    path = needed(args, "model_name_or_path")
    policy = find_folder(path, trust_remote_code=args.trust_remote_code)
    flag = "--load_in_4bit" if args.load_in_4bit else "--load_in_8bit"
    quantise = args.load_in_4bit or args.load_in_8bit
    if policy.quantised and quantise:
        raise InputError(f"{flag}: {path} is quantised already, by {policy.quantised}")
    if policy.quantised and not args.use_peft:
        raise InputError(
            f"--model_name_or_path {path}: its weights are quantised by {policy.quantised} and can't "
            "be trained; expected --use_peft too, or plain weights"
        )
    if policy.adapter is not None and quantise:
        raise InputError(
            f"{flag}: {path} is an adapter, which would be merged into quantised weights; merge it "
            f"first: sepo.model.load_model('{path}').save_pretrained(...)"
        )
    if args.should_log:
        print(f"policy: {policy}")
    return policy


def load_pairs(
    name: str, split: str, tokenizer: PreTrainedTokenizerBase, args: SePOConfig
) -> Sequence[TokenPair]:
    """Pairs of a scored store, or of raw preference data; what was dropped is printed."""
    if is_store(name):
        return ScoredStore.open(name, tokenizer)
    read = read_data(args, tokenizer, name=name, split=split, progress=not args.disable_tqdm)
    if args.should_log:
        say(str(read.report))
    return read.pairs


def find_reference(
    args: SePOConfig,
    policy: ModelFolder,
    data: dict[str, Sequence[TokenPair]],
    tokenizer: PreTrainedTokenizerBase,
) -> ReferenceFolder:
    """The folder of the reference, printed if it is not the policy's: the trainer decides the rest."""
    folder, named = policy, args.reference
    if named is not None:
        folder = find_folder(named, trust_remote_code=args.trust_remote_code)
        if args.should_log:
            print(f"reference: {folder}")
    return ReferenceFolder(
        folder,
        data,
        tokenizer,
        dtype=compute_dtype(args),
        weights_dtype=getattr(torch, args.dtype),
        attn_impl=args.attn_impl,
        trust_remote_code=args.trust_remote_code,
        adapters_stand_in=args.use_peft and named is None,
    )


def compute_dtype(args: SePOConfig) -> torch.dtype:
    """That of autocast where there is one, else of the weights."""
    return getattr(torch, "bfloat16" if args.bf16 else "float16" if args.fp16 else args.dtype)


def hold_output_dir(args: SePOConfig, held: ExitStack) -> None:
    """Take it for this run alone. Raises InputError for one that can't be trained in."""
    named = needed(args, "output_dir")
    output_dir = Path(named)
    held.enter_context(lock(named))
    if contents(output_dir) and args.resume_from_checkpoint is None:
        raise InputError(
            f"--output_dir {output_dir} is not empty: choose another, or continue with "
            "--resume_from_checkpoint true"
        )
    if isinstance(resume := resume_argument(args), str):
        completed_step(resume)  # raises for one that is not whole


def resume_argument(args: SePOConfig) -> str | bool | None:
    """`true` means the last complete checkpoint."""
    value = args.resume_from_checkpoint
    return True if value == "true" else value


def unread_flags(args: SePOConfig) -> list[str]:
    """In words: flags that were given and that this run's data and model have no use for."""
    notes = []
    for name, split in (
        (args.dataset_name, "dataset_split"),
        (args.eval_dataset_name, "eval_dataset_split"),
    ):
        given = given_of(args, split, "dataset_config", "max_length", "append_eos")
        if name is not None and is_store(name):
            why = f"{name} is a scored store, whose pairs are taken as they are"
            notes += [f"--{flag} does nothing: {why}" for flag in given]
        elif name is None:
            notes += [f"--{flag} does nothing without --eval_dataset_name" for flag in given[:1]]
    if not args.use_peft:
        lora = [name for name in vars(args) if name.startswith("lora_")]
        notes += [f"--{flag} does nothing without --use_peft" for flag in given_of(args, *lora)]
    return list(dict.fromkeys(notes))


if __name__ == "__main__":
    exit_with_one_line(main)
