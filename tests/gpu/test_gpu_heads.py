"""Both heads on a GPU: the definition's numbers for real vocabularies, and for very many logits."""

import pytest
import torch
from gpu import head_checks as checks
from gpu import step_checks
from ops.k_target_cases import OVER
from ops.kl_cases import DIRECTIONS

pytestmark = pytest.mark.gpu

IMPLS = ["triton", "chunked"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# less than a tile; odd, so that no row but the first is aligned; multiples of 16
VOCABULARIES = [31, 50257, 128256, 151936, 262144]
LOGPROB = [
    (V, variant)
    for V in VOCABULARIES
    for variant in (["plain", "bias", "scaled", "capped", "all"] if V == 31 else ["plain", "all"])
]
# both options and both directions for the first three, which compile differently; then in turn
KL = [(V, v, d) for V in VOCABULARIES[:3] for v in ("plain", "all") for d in DIRECTIONS]
KL += [(V, v, d) for V in VOCABULARIES[3:] for v, d in zip(("plain", "all"), DIRECTIONS)]  # noqa: B905


# implementations innermost, so that one truth serves both
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("V", "variant"), LOGPROB)
def test_logprob_is_as_accurate_as_plain_pytorch(V, variant, dtype, impl):
    checks.logprob(impl, "cuda", (40, 72, 64, V), dtype, variant)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("V", "variant", "direction"), KL)
def test_kl_is_as_accurate_as_plain_pytorch(V, variant, direction, dtype, impl):
    checks.kl(impl, "cuda", (40, 72, 64, 48, V), dtype, variant, direction)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("over", OVER)
def test_k_targets_are_as_accurate_as_plain_pytorch(over, dtype, impl):
    for N, M, D, V, K in [(40, 72, 64, 31, 3), (40, 72, 1100, 50257, 20), (9, 0, 64, 31, 3)]:
        checks.k_targets(impl, "cuda", (N, M, D, V, K), dtype, over)


@pytest.mark.parametrize("V", [31, 50257])
def test_float64(V):
    checks.logprob("chunked", "cuda", (40, 72, 64, V), torch.float64, "all")
    for direction in DIRECTIONS:
        checks.kl("chunked", "cuda", (40, 72, 64, 48, V), torch.float64, "all", direction)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("M", [0, 1])
def test_no_rows_and_one_row(M, impl):
    checks.logprob(impl, "cuda", (9, M, 45, 101), torch.bfloat16, "all")
    checks.kl(impl, "cuda", (9, M, 45, 24, 101), torch.bfloat16, "all", "policy||ref")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [576, 2048])
def test_nats_of_confident_and_unlikely_rows(D, dtype, impl):
    checks.nats_of_confident_and_unlikely_rows(impl, "cuda", 128, D, 49152, dtype)


@pytest.fixture
def as_in_training():
    """Without the tests' deterministic mode, which takes other kernels and fills memory with NaN."""
    torch.use_deterministic_algorithms(False)


# 1.004 * 2**31 logits: the last rows' offsets do not fit an int32
FAR = dict(M=8224, D=64, V=262144, ends=16)


@pytest.fixture
def forty_gigabytes():
    torch.cuda.empty_cache()
    if (free := torch.cuda.mem_get_info()[0]) < 40 << 30:
        pytest.skip(f"needs 40 GiB of free GPU memory, got {free >> 30}")
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_far_into_the_logits(impl, forty_gigabytes, as_in_training):
    checks.rows_far_into_the_logits(impl, "cuda", **FAR)


@pytest.mark.parametrize("impl", IMPLS)
def test_kl_rows_far_into_the_logits(impl, forty_gigabytes, as_in_training):
    checks.kl_rows_far_into_the_logits(impl, "cuda", **FAR)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeatable_bit_for_bit(dtype, impl, as_in_training):
    checks.repeatable(impl, "cuda", N=16, M=2048, D=64, V=5003, dtype=dtype)


MEMORY = dict(N=8192, M=1536, D=32, V=50257, dtype=torch.bfloat16)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("schedule", checks.LOGPROB_SCHEDULES)
def test_logprob_peak_memory(schedule, impl, as_in_training):
    step_checks.logprob_memory(impl, "cuda", **MEMORY, schedule=schedule)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("schedule", checks.KL_SCHEDULES)
def test_kl_peak_memory(schedule, impl, as_in_training):
    step_checks.kl_memory(impl, "cuda", **MEMORY, schedule=schedule)


# Inductor's and Dynamo's warnings are about themselves
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_as_one_graph(impl, as_in_training):
    step_checks.compiles(impl, "cuda", "inductor")


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl):
    step_checks.autocast_changes_nothing(impl, "cuda")
