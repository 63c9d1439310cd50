"""Every kernel that the launchers can launch, compiled for each target: that needs no GPU.

What is compiled is recorded from the launchers themselves, argument by argument, and has to be all
of the table in configs.py; so a kernel that was never compiled cannot be launched.
"""

import re
import subprocess
from itertools import product

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from sepo_kernels import triton_rows  # noqa: E402
from sepo_kernels.configs import CONFIGS  # noqa: E402
from sepo_kernels.selected_logprob import triton as logprob  # noqa: E402
from sepo_kernels.selected_logprob_kl import triton as kl  # noqa: E402

# bytes of shared memory that one program may have
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64"}


@pytest.fixture(scope="module")
def launched():
    """{kernel: {what Triton compiles one variant for}}, from launchers that launch nothing."""
    found = {name: set() for name in CONFIGS}

    def record(kernel, rows, columns, *args, **flags):
        name = kernel.fn.__name__
        found[name].add((tuple(map(describe, kernel.params, args)), tuple(sorted(flags.items()))))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_rows, "launch", record)
        for dtype, (V, start), softcap in product(
            list(DTYPES)[:3],
            [(64, 0), (31, 1)],  # every row begins at a multiple of 16 bytes, or hardly any does
            [None, 4.0],
        ):
            drive(dtype, V, start, softcap)
    return found


def drive(dtype, V, start, softcap):
    """Call all launchers as the loops would for rows `start` to 4."""
    new = lambda *shape, dtype=dtype: torch.zeros(4, *shape, dtype=dtype)[start:]
    x, weight, bias = new(8), torch.zeros(V, 8, dtype=dtype), torch.zeros(V, dtype=dtype)
    targets, row = new(dtype=torch.int64), new(dtype=torch.float32)
    z, ref_z = new(V, dtype=torch.float32), new(V, dtype=torch.float32)
    first, second, out = (new(V) for _ in range(3))
    head = x, weight, bias
    logprob.forward(*head, targets, 1.0, softcap, first, z)
    logprob.again(*head, targets, 1.0, softcap, first, z, row, row)
    for direction in ("policy||ref", "ref||policy"):
        two = *head, *head, targets, 1.0, softcap, direction, (first, second), (z, ref_z)
        kl.forward(*two)
        state = new(4, dtype=torch.float32)
        kl.again(*two, row, row, row, state)
        kl.combine(first, second, targets, 0, row, row, state, row, row, direction, out)


def describe(param, arg) -> tuple[str, bool]:
    """Type, and whether Triton compiles for a multiple of 16."""
    if isinstance(arg, torch.Tensor):
        aligned = arg.data_ptr() % 16 == 0 and not param.do_not_specialize_on_alignment
        return "*" + DTYPES[arg.dtype], aligned
    if isinstance(arg, float):
        return "fp32", False
    assert type(arg) is int
    # Triton compiles apart for an int of 1, unless told not to
    assert arg != 1 or param.do_not_specialize
    return "i32", arg % 16 == 0 and not param.do_not_specialize


def test_all_of_the_table_is_launched(launched):
    """For float32, float16 and bfloat16 inputs, aligned or not, every combination of flags."""
    for name, config in CONFIGS.items():
        flags = {flags for _, flags in launched[name]}
        wanted = product(*([(flag, False), (flag, True)] for flag in sorted(config.flags)))
        assert flags == set(wanted), name
        # what is read and written in the input's dtype is there once for each
        dtypes = 1 if name.endswith("_statistics") else 3
        assert len(launched[name]) == dtypes * 2 * len(flags), name


def compiled(name, types, flags, target):
    kernel, config = getattr(triton_rows, name), CONFIGS[name]
    constexprs = {**dict(flags), "BLOCK_V": config.BLOCK_V}
    signature = dict(zip(kernel.arg_names, [t for t, _ in types], strict=False))
    source = ASTSource(
        kernel,
        signature | dict.fromkeys(constexprs, "constexpr"),
        constexprs,
        {(i,): [["tt.divisibility", 16]] for i, (_, aligned) in enumerate(types) if aligned},
    )
    return triton.compile(source, target=target, options={"num_warps": config.num_warps})


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CONFIGS)
def test_compiles_without_spills(launched, name, target, tmp_path):
    gpu, most_shared = TARGETS[target]
    for types, flags in launched[name]:
        done = compiled(name, types, flags, gpu)
        what = f"{name} {flags} {types}"
        assert done.metadata.shared <= most_shared, what
        if gpu.backend == "cuda":
            used = resources(done.asm["cubin"], tmp_path / "kernel.cubin")
            # registers that did not suffice are on the stack
            assert used["STACK"] == used["LOCAL"] == 0, f"{what}: {used}"
            assert used["SHARED"] <= most_shared, what
        else:
            used = dict(re.findall(r"^ *\.(\w+): +(\d+)$", done.asm["amdgcn"], re.MULTILINE))
            for spill in ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"):
                assert used[spill] == "0", f"{what}: {used}"


def resources(cubin: bytes, path) -> dict[str, int]:
    path.write_bytes(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    command = [tool, "--dump-resource-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(n) for name, n in re.findall(r"\b([A-Z]+):(\d+)", text)}
