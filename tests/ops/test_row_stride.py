"""Rows of logits and of saved blocks begin at a GPU's cache lines, and are counted as such."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from sepo_kernels.devices import row_stride
from sepo_kernels.selected_logprob.layout import HeadLayout
from sepo_kernels.selected_logprob.loops import new_block
from sepo_kernels.selected_logprob_kl.layout import TwoHeadLayout

VOCABULARIES = [31, 32001, 50257, 128256, 151669, 262144]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_a_row_on_a_gpu_begins_at_a_cache_line(V, dtype):
    stride = row_stride(V, dtype, gpu=True)
    assert stride * dtype.itemsize % 128 == 0
    assert 0 <= (stride - V) * dtype.itemsize < 128
    assert row_stride(V, dtype, gpu=False) == V


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_blocks_have_that_stride_and_are_counted_with_it(V, dtype):
    with FakeTensorMode():
        blocks = new_block(torch.empty(1, device="cuda"), 5, V, False, dtype)
        logits = new_block(torch.empty(1, device="cuda", dtype=dtype), 5, V, False, torch.float32)
    for block in (blocks, logits):
        assert block.shape == (5, V) and block.stride() == (row_stride(V, block.dtype, True), 1)
    one = HeadLayout(V, dtype, False, False, multiprocessors=132)
    assert 5 * one.saved_bytes == blocks.untyped_storage().nbytes()
    narrow = 0 if dtype == torch.float32 else one.saved_bytes
    assert 5 * (one.row_bytes(gradient=True) - narrow) == logits.untyped_storage().nbytes()
    assert one.row_bytes(gradient=False) == one.row_bytes(gradient=True) - narrow
    two = TwoHeadLayout(V, dtype, dtype, False, multiprocessors=132)
    assert two.saved_bytes == 2 * one.saved_bytes
    assert two.row_bytes(gradient=False) == 2 * one.row_bytes(gradient=False)


def test_a_cpu_has_contiguous_rows():
    block = new_block(torch.empty(1), 5, 31, False, torch.bfloat16)
    assert block.is_contiguous() and block._base is None
    fused = new_block(torch.empty(1), 5, 31, True, torch.bfloat16)
    assert fused.T.is_contiguous()
