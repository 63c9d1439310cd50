"""Score every response token once: log p_oracle - log p_ref (SePO, arXiv 2408.13518, eq. 9).

Scoring is the expensive step and does not depend on how many tokens are selected later, so its
result is a store on disk, filled part by part: processes may share it, and may be killed.
"""

import dataclasses
import os
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import MappingProxyType

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import sepo
from sepo.data.hidden import ROW_DTYPE, HiddenRows, StoredHead, check_room, size_name
from sepo.data.segments import check_tokens
from sepo.data.store.manifest import arithmetics_of, begun_with
from sepo.data.store.store import (
    FORMAT,
    ScoredStore,
    StoreWriter,
    num_parts,
    pairs_hash,
    template_hash,
    tokenizer_hash,
)
from sepo.data.types import ScoredPair, TokenPair
from sepo.errors import InputError
from sepo.model.fingerprint import weights_hash
from sepo.model.forward import head, vocabulary
from sepo.model.prepare import prepare_if_new
from sepo.score.arithmetic import ARITHMETICS, AUTO, Chosen, choose_arithmetic
from sepo.score.logp import Answer, Asked, answers_of, check_budget, dtype_name, kept_logp
from sepo.score.precision import check_precision
from sepo.score.products import HALVES, SplitProducts
from sepo.system.lock import lock
from sepo.terminal import say

KEEP = ("score", "logp", "hidden")
SAMPLE = 16  # pairs that a precision check reads when nobody names a number


def score_dataset(
    pairs: Sequence[TokenPair],
    output_dir: str | os.PathLike,
    *,
    reference: PreTrainedModel | None,  # None: `pairs` is a store that keeps what it said
    oracle: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase,  # made the pairs, and belongs to both models
    keep: Sequence[str] = ("score",),  # any of KEEP; "logp" and "hidden" are the reference's
    max_tokens: int = 8192,  # of one batch, prompts counted once
    pairs_per_part: int = 128,  # what a killed run repeats at most
    shard: tuple[int, int] | None = None,  # (i, n); None: RANK and WORLD_SIZE, else (0, 1)
    # of both models or by role: "auto", or one of ARITHMETICS; None: each in its dtype
    arithmetic: str | Mapping[str, str] | None = None,
    precision_check: int | None = None,  # pairs to score in float32 too; None: 16, 0: never
    report: dict | None = None,  # what reading counted, for the manifest
    max_length: int | None = None,  # to which the pairs were cut, for the manifest
    progress: bool = True,
) -> Path:
    """Write each response token's score, and what else is kept of it, to a scored store.

    score = log p_oracle(y_t | x, y_<t) - log p_ref(y_t | x, y_<t), in nats, float32, no beta
    (eq. 9). Models come from `sepo.model.load_model`; each stays on its own device and in its own
    dtype. Part j of the store (a block of `pairs_per_part` pairs) belongs to shard j % n, and a run
    writes what is missing of its shard: run it again after a kill, with any n; on one kind of
    device (and number of CPU threads) the parts come out the same, bit for bit. Without an oracle
    the reference alone is cached: "logp", its log-probabilities; "hidden", its bfloat16 states
    after the final norm, D_ref values a response token, and once its head. One pass gives both.
    Where `pairs` is such a store with "logp", the oracle's pass is all that scores cost. A
    model in another dtype than float32 is compared with float32 on a few pairs: printed, and kept
    in the manifest. A float32 model may make its products of halves (`arithmetic`: "split",
    "tf32x3"), which is compared too; "auto" takes the fastest whose selection is float32's, or what
    the store was begun in. Returns `output_dir`.

    Raises InputError, before anything is written, for a token that a model lacks, a pair longer
    than `max_tokens`, a directory that holds another run, a disk without room for the states, a
    `keep` that does not fit the models, pairs that keep nothing of a reference that is None, a
    directory that can't be written to, a shard that another process is scoring, and an arithmetic
    that a model's dtype or device does not have;
    later for a log-probability that is not finite (naming the row; nothing of its part is written).
    """
    if not pairs:
        raise InputError("expected at least one pair to score, got none")
    if pairs_per_part < 1:
        raise InputError(f"pairs_per_part: expected at least 1, got {pairs_per_part}")
    keep = _checked_keep(keep, oracle, reference)
    index, count = _checked_shard(shard)
    for role, model in (("reference", reference), ("oracle", oracle)):
        if model is not None:
            size = vocabulary(prepare_if_new(model))
            for pair in pairs:
                check_tokens(pair, {role: size})
    check_budget(pairs, max_tokens)
    given = {"reference": reference, "oracle": oracle}
    models = {role: model for role, model in given.items() if model is not None}
    sample = SAMPLE if precision_check is None else precision_check
    begun = arithmetics_of(Path(output_dir), models)
    chosen = choose_arithmetic(_asked(arithmetic, models), models, pairs, sample, max_tokens, begun)
    manifest = {
        "format": FORMAT,
        "sepo": sepo.__version__,
        # older versions made it another way: one of theirs is gone on with
        "tokenizer": tokenizer_hash(tokenizer, like=begun_with(Path(output_dir), "tokenizer")),
        "tokenizer_name": tokenizer.name_or_path,
        "chat_template": template_hash(tokenizer),
        **_about_model("oracle", oracle),
        **(_about_kept(pairs) if reference is None else _about_model("reference", reference)),
        **_about_arithmetic(chosen),
        "source": pairs_hash(pairs),
        "reading": report,
        "max_length": max_length,
        "keep": keep,
        "pairs": len(pairs),
        "pairs_per_part": pairs_per_part,
    }
    if reference is not None and "hidden" in keep:
        manifest |= _about_rows(reference)
    if oracle is not None and manifest["oracle"] == manifest["reference"]:
        warnings.warn(
            "oracle and reference are the same weights: every score will be zero, and selection "
            "will keep the first tokens of each response",
            stacklevel=2,
        )
    with lock(output_dir, owner := shard_name(shard)):
        writer = StoreWriter(output_dir, manifest, owner=owner)
        _fill(
            writer, pairs, reference, oracle, chosen, max_tokens, (index, count), precision_check,
            progress,
        )  # fmt: skip
    return Path(output_dir)


def shard_name(shard: tuple[int, int] | None) -> str:
    """Under which a process that scores a shard holds the lock of its store: `sepo.system.lock`."""
    return "shard{}of{}".format(*_checked_shard(shard))


def _fill(
    writer: StoreWriter,
    pairs: Sequence[TokenPair],
    reference: PreTrainedModel | None,
    oracle: PreTrainedModel | None,
    chosen: Chosen,
    max_tokens: int,
    shard: tuple[int, int],
    precision_check: int | None,
    progress: bool,
) -> None:
    """Score and write the shard's parts that are missing."""
    (index, count), keep = shard, writer.manifest["keep"]
    missing = writer.missing()
    mine = [part for part in missing if part % count == index]
    if reference is not None and "hidden" in keep:
        _make_room(writer, [pairs[i] for part in missing for i in writer.pairs_of(part)], progress)
        writer.write_head(StoredHead(*head(reference)))
    if mine:
        writer.begin()  # before the expensive part: a full disk shows
    if precision_check is None:
        precision_check = SAMPLE if 0 in mine else 0
    checked = chosen.check
    if index == 0 and checked is None:
        given = pairs, oracle, reference, precision_check, max_tokens
        checked = check_precision(*given, chosen.products)
    devices = sorted({_device_name(m) for m in (oracle, reference) if m is not None})

    start = time.perf_counter()
    total = sum(len(pairs[i]) for part in mine for i in writer.pairs_of(part))
    with tqdm(total=total, unit="token", unit_scale=True, disable=not progress) as bar:
        blocks = ([pairs[i] for i in writer.pairs_of(part)] for part in mine)
        scored = _scored(blocks, reference, oracle, keep, max_tokens, bar.update, chosen.products)
        with closing(scored):
            for part, block in zip(mine, scored, strict=True):
                note = {"devices": devices, "precision_check": checked if part == 0 else None}
                writer.write(part, block, note=note)
    complete = writer.finish()
    if progress:
        _print_end(writer, complete, total, time.perf_counter() - start)


def score_pairs(
    pairs: list[TokenPair],
    reference: PreTrainedModel | None,  # None: the pairs carry its log-probabilities
    oracle: PreTrainedModel | None = None,
    *,
    keep: Sequence[str] = ("score",),
    max_tokens: int = 8192,
    # called with the number of a batch's tokens when all models have read it
    on_batch: Callable[[int], object] = lambda tokens: None,
    products: Mapping[str, SplitProducts] = MappingProxyType({}),  # by role, of halves
) -> list[ScoredPair]:
    """Score pairs in memory, in their own order; see `score_dataset`."""
    keep = _checked_keep(keep, oracle, reference)
    scored = _scored([pairs], reference, oracle, keep, max_tokens, on_batch, products)
    with closing(scored):
        return next(scored)


def _scored(
    blocks: Iterable[list[TokenPair]],
    reference: PreTrainedModel | None,
    oracle: PreTrainedModel | None,
    keep: Sequence[str],
    max_tokens: int,
    on_batch: Callable[[int], object],
    products: Mapping[str, SplitProducts],
) -> Generator[list[ScoredPair], None, None]:
    """Each block scored. Close what is not exhausted."""
    asked = {}
    if reference is not None:
        states = ROW_DTYPE if "hidden" in keep else None
        asked["reference"] = Asked(reference, products.get("reference"), states)
    if oracle is not None:
        asked["oracle"] = Asked(oracle, products.get("oracle"))
    with closing(answers_of(blocks, asked, max_tokens, on_batch)) as told:
        for block, answers in told:
            yield _with_scores(block, answers, keep)


def _with_scores(
    block: list[TokenPair], answers: Mapping[str, Answer], keep: Sequence[str]
) -> list[ScoredPair]:
    rows = answers["reference"].states if "reference" in answers else None
    ref_logp = answers["reference"].logp if "reference" in answers else kept_logp(block)
    scored, end = [], 0
    for i, pair in enumerate(block):
        fields = {f.name: getattr(pair, f.name) for f in dataclasses.fields(TokenPair)}
        for j, side in enumerate(("chosen", "rejected")):
            if "oracle" in answers:
                fields[f"{side}_score"] = answers["oracle"].logp[i][j] - ref_logp[i][j]
            if "logp" in keep:
                fields[f"{side}_ref_logp"] = ref_logp[i][j]
            if rows is not None:
                start, end = end, end + len(ref_logp[i][j])
                fields[f"{side}_ref_hidden"] = HiddenRows(rows, start, end - start)
        scored.append(ScoredPair(**fields))
    return scored


def _checked_keep(
    keep: Sequence[str], oracle: PreTrainedModel | None, reference: PreTrainedModel | None
) -> list[str]:
    kept = sorted(set(keep))
    if not kept or not set(kept) <= set(KEEP):
        raise InputError(f"keep: expected some of {', '.join(KEEP)}, got {list(keep)}")
    if "score" in kept and oracle is None:
        raise InputError("keep: a score needs an oracle; give one, or keep 'logp' or 'hidden'")
    if "score" not in kept and oracle is not None:
        raise InputError(f"keep: {kept} does not use the oracle; add 'score', or leave it out")
    if reference is None and ("hidden" in kept or oracle is None):
        raise InputError(f"keep: {kept} needs a pass of the reference, got no model for it")
    return kept


def _checked_shard(shard: tuple[int, int] | None) -> tuple[int, int]:
    if shard is None:  # what torchrun sets
        shard = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if not 0 <= shard[0] < shard[1]:
        raise InputError(f"shard: expected i/n with 0 <= i < n, got {shard[0]}/{shard[1]}")
    return shard


def _number(variable: str, default: int) -> int:
    try:
        return int(text := os.environ.get(variable, str(default)))
    except ValueError as error:
        raise InputError(f"{variable}: expected a number, got {text!r}") from error


def _about_model(role: str, model: PreTrainedModel | None) -> dict:
    if model is None:
        return {role: None, f"{role}_dtype": None, f"{role}_name": None}
    return {
        role: weights_hash(model),
        f"{role}_dtype": dtype_name(model),
        f"{role}_name": model.name_or_path,
    }


def _asked(
    arithmetic: str | Mapping[str, str] | None, models: Mapping[str, PreTrainedModel]
) -> dict[str, str]:
    """By role, of the models that are there."""
    by_role = dict.fromkeys(models, arithmetic) if isinstance(arithmetic, str) else arithmetic or {}
    asked = {role: by_role.get(role) or dtype_name(model) for role, model in models.items()}
    for role, name in asked.items():
        if name not in (AUTO, *ARITHMETICS, dtype_name(models[role])):
            known = ", ".join((AUTO, *ARITHMETICS))
            raise InputError(f"{role}: expected arithmetic {known}, got {name}")
    return asked


def _about_arithmetic(chosen: Chosen) -> dict:
    """The entries for what a dtype does not say; without them a manifest means the dtypes' own."""
    halved = {
        f"{role}_arithmetic": name for role, name in chosen.arithmetics.items() if name in HALVES
    }
    return halved | ({} if chosen.reason is None else {"arithmetic_reason": chosen.reason})


def _about_kept(pairs: Sequence[TokenPair]) -> dict:
    if not isinstance(pairs, ScoredStore) or "logp" not in pairs.manifest["keep"]:
        raise InputError(
            "reference: expected a model, or a store with its log-probabilities for pairs "
            "(`sepo score --keep logp`), got neither"
        )
    keys = ("reference", "reference_dtype", "reference_name")
    about = {key: pairs.manifest[key] for key in keys}
    halved = pairs.manifest.get("reference_arithmetic")
    return about if halved is None else about | {"reference_arithmetic": halved}


def _about_rows(reference: PreTrainedModel) -> dict:
    dtype = str(ROW_DTYPE).removeprefix("torch.")
    return {"hidden_width": _width(reference), "hidden_dtype": dtype}


def _make_room(writer: StoreWriter, pairs: list[TokenPair], say: bool) -> None:
    tokens, width = _response_tokens(pairs), writer.manifest["hidden_width"]
    num_bytes = tokens * width * ROW_DTYPE.itemsize
    if say:
        size = f"{tokens} response tokens x {width} x {ROW_DTYPE.itemsize} bytes"
        print(f"reference rows: {size_name(num_bytes)} to write ({size})")
    check_room(writer.path, num_bytes)


def _response_tokens(pairs: list[TokenPair]) -> int:
    return sum(len(p.chosen) + len(p.rejected) for p in pairs)


def _width(model: PreTrainedModel) -> int:
    return head(model).weight.shape[1]


def _device_name(model: PreTrainedModel) -> str:
    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    return model.device.type


def _print_end(writer: StoreWriter, complete: bool, tokens: int, seconds: float) -> None:
    if complete:
        say(f"complete store: {writer.path}")
    else:
        missing, total = len(writer.missing()), num_parts(writer.manifest)
        say(f"{writer.path}: {missing} of {total} parts are left to the other shards")
    print(f"scored {tokens} tokens in {seconds:.1f} s, {tokens / max(seconds, 1e-9):.0f} tokens/s")
