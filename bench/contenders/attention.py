"""Packed attention, each implementation, and what a padded batch of the same pairs costs.

The padded peers read each prompt twice and every sequence as long as the longest.
"""

from functools import partial

import torch
import torch.nn.functional as F

from bench.contender import Contender
from bench.contenders.ours import version
from sepo.attention import IMPLS, PackedLayout, Terms, choose, explain
from sepo.errors import InputError


def _packed(inputs, impl: str) -> dict:
    layout = inputs.layouts.setdefault(impl, PackedLayout(inputs.batch, impl))
    leaves = inputs.leaves()
    return inputs.result(layout.attend(*leaves, scale=None), leaves, inputs.upstream)


def _terms(inputs) -> Terms:
    width = inputs.case.width
    return Terms(inputs.query.device, inputs.case.dtype, width, width, gradient=True)


def _why_not(inputs, impl: str) -> str | None:
    try:
        choose(impl, _terms(inputs))
    except InputError as error:
        return str(error)
    if choose("auto", _terms(inputs)).name == impl:
        return 'it is what "auto" takes here'


def _masked(inputs) -> dict:
    """As transformers calls it for a padded batch: a mask of booleans, keys repeated for the heads."""
    leaves = query, key, value = inputs.padded_leaves()
    repeats, (_, real) = query.shape[1] // key.shape[1], inputs.places
    L = query.shape[2]
    causal = torch.ones(L, L, dtype=torch.bool, device=query.device).tril()
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    out = F.scaled_dot_product_attention(query, key, value, causal & real[:, None, None])
    return inputs.result(out.transpose(1, 2).contiguous(), leaves, inputs.padded[3])


def _causal(inputs) -> dict:
    """Without a mask: padding on the right sees all and is seen by nothing."""
    leaves = inputs.padded_leaves()
    out = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    return inputs.result(out.transpose(1, 2).contiguous(), leaves, inputs.padded[3])


def _padding(inputs, how: str) -> str:
    rows = inputs.places[0].numel()
    return f"{how}, {rows} rows instead of {len(inputs.batch.tokens)}"


_ours = dict(version=version, ours=True)
ATTENTION = (
    Contender(
        "sepo", partial(_packed, impl="auto"), **_ours,
        note=lambda inputs: explain("auto", _terms(inputs)).partition(";")[0],
    ),
    *(
        Contender(
            f"sepo:{impl.name}", partial(_packed, impl=impl.name),
            partial(_why_not, impl=impl.name), **_ours,
        )
        for impl in IMPLS
    ),
    Contender("padded_sdpa", _masked, objective="padded", note=partial(_padding, how="mask")),
    Contender("padded_sdpa_causal", _causal, objective="padded", note=partial(_padding, how="no mask")),
)  # fmt: skip
