"""Each machine is measured in the dtype that it multiplies fastest, and waits for no emulation."""

import pytest
import torch
from bench_jobs import ATTENTION, TINY
from torch.utils._python_dispatch import TorchDispatchMode

from bench import contenders, jobs, measure, precision, report, run
from bench.contenders.attention import ATTENTION as ATTENTION_CONTENDERS
from bench.harness import Job
from bench.operations import attention, head, kl
from sepo_kernels import platform

CASES = {
    "head": head.HeadCase("tiny", 0.5, torch.bfloat16, **TINY),
    "kl": kl.KLCase("tiny", "ref||policy", N=24, M=10, D=16, V=101),
    "attention": attention.AttentionCase("tiny", **ATTENTION),
}


@pytest.fixture
def multiplies(monkeypatch):
    """As a machine that multiplies this dtype fastest."""

    def fastest(dtype):
        monkeypatch.setattr(platform, "fast_dtype", lambda device: dtype)

    return fastest


@pytest.mark.parametrize("dtype, kind", [(torch.bfloat16, "bf16"), (torch.float32, "fp32")])
def test_the_short_run_is_in_the_faster_dtype(dtype, kind, multiplies, monkeypatch):
    """Operations and the step; what is named is run as it is named."""
    multiplies(dtype)
    asked = []
    monkeypatch.setattr(run, "measure", lambda args, options: asked.append(options) or 0)
    for more in ([], ["--float32"], ["--dtype", "bfloat16"]):
        assert run.main(["--device", "cpu", *more]) == 0
    assert [options["dtype"] for options in asked] == [
        str(dtype).removeprefix("torch."),
        "float32",
        "bfloat16",
    ]
    *operations, step = jobs.jobs((), **asked[0])
    assert [x.name for x in operations] == [f"head-{kind}-30", "topk-30", f"attention-{kind}-8"]
    assert [x.case.dtype for x in operations[::2]] == [dtype, dtype]
    assert (step.name, step.case.float32) == ("step-short", dtype == torch.float32)
    assert {p.name for p in operations[0].contenders} >= {"gemm", "sepo", "cce", "liger_simpo"}
    named = jobs.jobs((), **asked[0] | dict(cases=("head-bf16-30",)))
    assert [x.name for x in named] == ["head-bf16-30"]


@pytest.mark.parametrize("suite", CASES)
def test_peers_of_a_slow_bfloat16(suite, multiplies):
    """Left out with a reason, unless named; the bare products are of the faster dtype."""
    multiplies(torch.float32)
    case = CASES[suite]
    found = {"head": contenders.HEAD, "kl": contenders.KL, "attention": ATTENTION_CONTENDERS}[suite]
    found = [p for p in found if p.name.startswith(("gemm", "dense", "softmax", "padded"))]
    slow = Job(case, found, device="cpu", slow_too=False)
    rows = {row.provider: row for row in slow.gate()}
    if gemm := rows.pop("gemm", None):
        assert gemm.status == "passed" and gemm.note == f"{case.products} bare products in float32"
    assert len(rows) == 2 and {row.status for row in rows.values()} == {"skipped"}
    for name, row in rows.items():
        assert "multiplies bfloat16 slowly" in row.reason
        assert f"--providers {name} has" in row.reason
    peers = [row for row in Job(case, found, device="cpu").gate() if row.provider != "gemm"]
    assert {row.status for row in peers} == {"passed"}

    (chosen,) = jobs.jobs((), device="cpu", cases=("head-bf16-30",), providers=("cce",))
    assert chosen.slow_too
    assert not jobs.jobs((), device="cpu", cases=("head-bf16-30",))[0].slow_too
    multiplies(torch.bfloat16)
    rows = Job(case, found, device="cpu", slow_too=False).gate()
    assert {row.status for row in rows} == {"passed"}
    assert all("float32" not in row.note for row in rows)


class Products(TorchDispatchMode):
    """Which dtypes are multiplied."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            self.dtypes.add(args[0].dtype)
        return operator(*args, **kwargs or {})


@pytest.mark.parametrize("fastest", [torch.bfloat16, torch.float32])
def test_the_yardstick_multiplies_what_is_fast(fastest, multiplies):
    """Of the gate, at the same errors: bfloat16's products round a sum once."""
    for case in CASES.values():
        multiplies(torch.bfloat16)
        own = case.inputs("cpu").baselines
        multiplies(fastest)
        with Products() as products:
            found = case.inputs("cpu").baselines
        assert products.dtypes == {fastest, torch.float64}
        for name, errors in own.items():
            assert found[name] == pytest.approx(errors, rel=0.3)
        assert measure.Roof("cpu", case.dtype).dtype == fastest
    assert precision.quick(torch.float32, "cpu") == torch.float32


def test_a_cpu_that_cannot_or_may_not_use_wide_instructions_is_another_machine(monkeypatch):
    cpu = lambda has, uses: (
        monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: has == "AVX512"),
        monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: has != ""),
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: uses),
    )
    cpu("AVX512", "AVX512")
    whole = report.default_path("cpu")
    assert whole.stem.endswith("-cores")
    for has, uses, more in [
        ("AVX2", "AVX2", ", AVX2 alone"),
        ("", "DEFAULT", ""),
        ("AVX512", "AVX2", ", AVX2 alone, emulated"),
    ]:
        cpu(has, uses)
        assert report.machine("cpu").partition(" cores")[2] == more
        assert report.default_path("cpu").stem == whole.stem + ("-avx2" if more else "")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    about = report.surroundings("cpu")
    assert about["machine"].endswith(" cores, AVX2 alone, emulated")
    assert about["environment"]["ONEDNN_MAX_CPU_ISA"] == "AVX2"
