"""Every kernel that the launchers can launch, compiled for each target: that needs no GPU.

What is compiled is recorded from the launchers themselves, argument by argument, and has to be all
of the table in configs.py; so a kernel that was never compiled cannot be launched. Registers, spills
and the width of each access to memory are read from the compiled code.
"""

import re
import subprocess
from itertools import product

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from sepo_kernels import triton_rows, triton_split, triton_targets  # noqa: E402
from sepo_kernels.configs import CONFIGS, bytes_moved  # noqa: E402
from sepo_kernels.selected_logprob import triton as logprob  # noqa: E402
from sepo_kernels.selected_logprob_kl import triton as kl  # noqa: E402
from sepo_kernels.selected_logprob_kl.layout import POLICY_REF, REF_POLICY  # noqa: E402
from sepo_kernels.selected_stats import triton as stats  # noqa: E402
from sepo_kernels.selected_stats.loops import Rows  # noqa: E402
from sepo_kernels.target_logits import triton as k_targets  # noqa: E402

# bytes of shared memory that one program may have
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}
# of the ptxas that Triton 3.6 brings: under a cap a few registers more, and of some kernels on sm_90
# one address that a row reads once or twice, in no loop, is on the stack; of stats_row two
OLD = triton.__version__.startswith("3.6.")
MORE_REGISTERS, MOST_STACK = (4, 8) if OLD else (0, 0)
MOST_STACK_OF = {"stats_row": 16} if OLD else {}
BYTES = {"*fp32": 4, "*fp16": 2, "*bf16": 2}
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64"}


# V, columns from one row to the next, the first row: rows of whole cache lines, as the loops make
# them, whose last tile has 31 columns; rows that hardly ever begin at a multiple of 16 bytes
ALIGNED, RAGGED = (31, 64, 0), (31, 31, 1)


@pytest.fixture(scope="module")
def launched():
    """{kernel: {what Triton compiles one variant for}}, from launchers that launch nothing."""
    found = {name: set() for name in CONFIGS}

    def record(kernel, rows, columns, *args, **flags):
        types = tuple(map(describe, kernel.params, args))
        found[kernel.fn.__name__].add((kernel, types, tuple(sorted(flags.items()))))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_rows, "launch", record)
        for dtype, shape, softcap in product(list(DTYPES)[:3], [ALIGNED, RAGGED], [None, 4.0]):
            drive(dtype, *shape, softcap)
    return found


def drive(dtype, V, stride, start, softcap):
    """Call all launchers as the loops would for rows `start` to 4."""
    new = lambda *shape, dtype=dtype: torch.zeros(4, *shape, dtype=dtype)[start:]
    block = lambda dtype: new(stride, dtype=dtype)[:, :V]
    x, weight, bias = new(8), torch.zeros(V, 8, dtype=dtype), torch.zeros(V, dtype=dtype)
    targets, row = new(dtype=torch.int64), new(dtype=torch.float32)
    z, ref_z = block(torch.float32), block(torch.float32)
    first, second, out = (
        block(dtype),
        block(kl.KERNELS.second_dtype(dtype, REF_POLICY)),
        block(dtype),
    )
    head = x, weight, bias
    logprob.forward(*head, targets, 1.0, softcap, None, z)
    logprob.forward(*head, targets, 1.0, softcap, first, z)
    logprob.recompute(*head, targets, 1.0, softcap, first, z, row, row)
    stats.forward(*head, targets, 1.0, softcap, None, z)
    stats.forward(*head, targets, 1.0, softcap, first, z)
    stats.gradient(z, 0, bias, 1.0, softcap, Rows(targets, *[row] * 6), out)
    for beta in (POLICY_REF, REF_POLICY, 0.5):
        two = *head, *head, targets, 1.0, softcap, 1.0, softcap, beta
        kl.forward(*two, None, (z, ref_z))
        kl.forward(*two, (first, second), (z, ref_z))
        state = new(kl.NUM_STATE, dtype=torch.float32)
        kl.recompute(*two, (first, second), (z, ref_z), row, row, row, state)
        kl.combine(first, second, targets, 0, row, row, state, row, row, beta, out)
    drive_targets(dtype, V, stride)


def drive_targets(dtype, V, stride):
    """Call the launchers of K targets a row; D is what lies between rows of logits."""
    hidden, weight = torch.zeros(4, stride, dtype=dtype), torch.zeros(V, stride, dtype=dtype)
    rows, targets = torch.arange(4, dtype=torch.int32), torch.zeros(4, 3, dtype=torch.int64)
    k_targets.dots(hidden, weight, rows, targets, 0)
    k_targets.sum_targets(torch.zeros(4, 3), weight, targets, 0)
    k_targets.add_to_targets(weight, torch.zeros(4, 3), hidden, rows, targets, 0)


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
        flags = {flags for *_, flags in launched[name]}
        wanted = product(*([(flag, False), (flag, True)] for flag in sorted(config.flags)))
        assert flags == set(wanted), name
        # what is read and written in the input's dtype is there once for each that takes this way
        two = ("logprob_dlogits", "kl_dlogits", "kl_combine", "jsd_dlogits")
        dtypes = 2 if name in two else 1
        dtypes += name == "logprob_dlogits"  # bfloat16 too, where the backward recomputes it
        dtypes += 2 * (name == "entropy_dlogits")  # from any dtype's logits, in one kernel
        dtypes = 3 if name.startswith("target_") else dtypes  # they read rows of the head itself
        assert len(launched[name]) == dtypes * 2 * len(flags), name


@pytest.mark.parametrize("dtype", list(DTYPES)[:3], ids=str)
def test_bytes_moved_are_those_of_the_launches(monkeypatch, dtype):
    """Each block once for each kernel that it is handed to."""
    moved = []
    count = lambda args: sum(
        x.shape[1] * x.itemsize for x in args if isinstance(x, torch.Tensor) and x.dim() == 2
        and x.shape[1] == 31
    )  # fmt: skip
    monkeypatch.setattr(triton_rows, "launch", lambda *args, **_: moved.append(count(args[3:])))
    x, weight, row = torch.zeros(4, 8, dtype=dtype), torch.zeros(31, 8, dtype=dtype), torch.zeros(4)
    targets, acc = torch.zeros(4, dtype=torch.int64), torch.float32
    blocks = [
        torch.zeros(4, 31, dtype=t) for t in (dtype, kl.KERNELS.second_dtype(dtype, REF_POLICY))
    ]
    logits = [k if k.dtype == acc else torch.zeros(4, 31) for k in blocks]
    head = x, weight, None

    def assert_moves(step, heads, call, *args, more=0):
        moved.clear()
        call(*args)
        assert sum(moved) == bytes_moved(step, heads, 31, dtype) + more, (step, heads)

    one = *head, targets, 1.0, None
    assert_moves("forward", 1, logprob.forward, *one, None, logits[0])
    assert_moves("dlogits", 1, logprob.forward, *one, blocks[0], logits[0])
    assert_moves("recompute", 1, logprob.recompute, *one, blocks[0], logits[0], row, row)
    more = 4 * 31 if dtype == acc else 0  # entropy_row's
    assert_moves("forward", 1, stats.forward, *one, None, logits[0], more=more)
    assert_moves("dlogits", 1, stats.forward, *one, blocks[0], logits[0], more=more)
    numbers = Rows(targets, *[row] * 6)
    assert_moves("recompute", 1, stats.gradient, logits[0], 0, None, 1.0, None, numbers, blocks[0])
    two = *head, *head, targets, 1.0, None, 1.0, None, POLICY_REF
    assert_moves("forward", 2, kl.forward, *two, None, logits)
    assert_moves("dlogits", 2, kl.forward, *two, blocks, logits)
    state = torch.zeros(4, kl.NUM_STATE)
    assert_moves("recompute", 2, kl.recompute, *two, blocks, logits, row, row, row, state)
    rest = targets, 0, row, row, state, row, row, POLICY_REF, torch.zeros(4, 31, dtype=dtype)
    assert_moves("combine", 2, kl.combine, *blocks, *rest)


def compiled(kernel, types, flags, target):
    config = CONFIGS[kernel.fn.__name__]
    constexprs = {**dict(flags), "BLOCK_V": config.BLOCK_V}
    signature = dict(zip(kernel.arg_names, [t for t, _ in types], strict=False))
    source = ASTSource(
        kernel,
        signature | dict.fromkeys(constexprs, "constexpr"),
        constexprs,
        {(i,): [["tt.divisibility", 16]] for i, (_, aligned) in enumerate(types) if aligned},
    )
    return triton.compile(source, target=target, options={"num_warps": config.num_warps})


def is_hard(target: str, kernel, types, flags) -> bool:
    """One with all flags, which has most to keep; on sm_90 of rows by the cache line all."""
    return all(on for _, on in flags) or (target == "sm_90" and is_aligned(kernel, types))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_hard_ones_compile_without_spills(launched, name, target, tmp_path):
    hard = [variant for variant in launched[name] if is_hard(target, *variant)]
    assert hard
    assert_no_spills(name, hard, target, tmp_path)


@pytest.mark.every_target
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_others_compile_without_spills(launched, name, target, tmp_path):
    others = [variant for variant in launched[name] if not is_hard(target, *variant)]
    assert_no_spills(name, others, target, tmp_path)


def assert_no_spills(name, variants, target, tmp_path):
    gpu, most_shared = TARGETS[target]
    config = CONFIGS[name]
    for kernel, types, flags in variants:
        done = compiled(kernel, types, flags, gpu)
        what = f"{name} {flags} {types}"
        assert done.metadata.shared <= most_shared, what
        if gpu.backend == "cuda":
            used = resources(done.asm["cubin"], tmp_path / "kernel.cubin")
            # registers that did not suffice are on the stack
            most = MOST_STACK_OF.get(name, MOST_STACK)
            assert used["LOCAL"] == 0 and used["STACK"] <= most, f"{what}: {used}"
            if used["STACK"]:
                assert_stack_in_no_loop(tmp_path / "kernel.cubin", what)
            assert used["SHARED"] <= most_shared, what
            if is_aligned(kernel, types):
                capped = dict(flags).get("CAPPED", False)
                most = config.registers_capped + MORE_REGISTERS if capped else config.registers
                assert used["REG"] <= most, f"{what}: {used}"
                assert_wide(tmp_path / "kernel.cubin", kernel, types, dict(flags), what)
        else:
            used = dict(re.findall(r"^ *\.(\w+): +(\d+)$", done.asm["amdgcn"], re.MULTILINE))
            for spill in ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"):
                assert used[spill] == "0", f"{what}: {used}"


@pytest.mark.slow
@pytest.mark.parametrize("three", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_products_of_halves_compile_without_spills(target, three, tmp_path):
    gpu, most_shared = TARGETS[target]
    kernel, tile = triton_split.split_linear_tile, triton_split.TILE._asdict()
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    constexprs = {"THREE": three, **tile}
    types = ["*fp32", "*bf16", "*bf16", "*fp32", "*fp32", *["i32"] * 6]
    signature = dict(zip(kernel.arg_names, types, strict=False))
    source = ASTSource(
        kernel,
        signature | dict.fromkeys(constexprs, "constexpr"),
        constexprs,
        # pointers and rows as allocated; D of every model is a multiple of 16
        {(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 3, 4, 5, 6, 9)},
    )
    done = triton.compile(source, target=gpu, options=options)
    assert done.metadata.shared <= most_shared
    if gpu.backend == "cuda":
        used = resources(done.asm["cubin"], tmp_path / "kernel.cubin")
        assert used["LOCAL"] == 0 and used["STACK"] <= MOST_STACK, used
        products = re.findall(r"(wgmma|mma|tcgen05\.mma)\S*bf16\S*|kind::f16", done.asm["ptx"])
        assert products, "expected bfloat16 products"
    else:
        assert "mfma_f32" in done.asm["amdgcn"] and "bf16" in done.asm["amdgcn"]
        used = dict(re.findall(r"^ *\.(\w+): +(\d+)$", done.asm["amdgcn"], re.MULTILINE))
        for spill in ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"):
            assert used[spill] == "0", used


def resources(cubin: bytes, path) -> dict[str, int]:
    path.write_bytes(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    command = [tool, "--dump-resource-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(n) for name, n in re.findall(r"\b([A-Z]+):(\d+)", text)}


def is_aligned(kernel, types) -> bool:
    named = zip(kernel.arg_names, types, strict=False)
    return all(aligned for name, (_, aligned) in named if name.startswith("stride_"))


def disassembled(cubin) -> str:
    command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def assert_stack_in_no_loop(cubin, what):
    """What is there is stored and read once a row, and not once a tile."""
    code = disassembled(cubin)
    place = {found[1]: found.start() for found in re.finditer(r"^(\.L_\w+):", code, re.MULTILINE)}
    jumps = [
        (found.start(), place[found[1]]) for found in re.finditer(r"BRA.*`\((\.L_\w+)\)", code)
    ]
    loops = [(target, jump) for jump, target in jumps if target < jump]
    accesses = [found.start() for found in re.finditer(r"\b(LDL|STL)\b", code)]
    assert loops and accesses, what
    assert not any(begin < x < end for x in accesses for begin, end in loops), what


def assert_wide(cubin, kernel, types, flags, what):
    """What a thread has of the whole tiles is read 16 bytes at a time, and written 8 or 16."""
    config, types = CONFIGS[kernel.fn.__name__], dict(zip(kernel.arg_names, types, strict=False))
    each = config.BLOCK_V // (32 * config.num_warps)
    # and once more, if hopeless; entropy_row looks for the largest with a mask, then walks once;
    # jsd_row has kl_row's sums
    once = ("entropy_row", "jsd_row")
    walks = 2 if kernel.fn.__name__.endswith("_row") and kernel.fn.__name__ not in once else 1
    loaded = {"logits_ptr", "ref_logits_ptr", "bias_ptr", "ref_bias_ptr"}
    stored = {"dlogits_ptr", "first_ptr", "second_ptr", "out_ptr"}
    if "combine" in kernel.fn.__name__:
        loaded, stored = stored - {"out_ptr"}, {"out_ptr"}
    elif kernel.fn.__name__.startswith("target_"):
        loaded, stored = {"x_ptr", "weight_ptr"}, set()
        each *= 1 if kernel.fn.__name__ == "target_dots" else triton_targets.TERMS.value
    elif not flags.get("WRITE_DLOGITS", flags.get("WRITE_BLOCKS", True)):
        stored = set()
    code = disassembled(cubin)
    for access, blocks, widths in (("LDG", loaded, "128"), ("STG", stored, "64|128")):
        wanted = walks * sum(each * BYTES[types[name][0]] for name in blocks & types.keys())
        wide = re.findall(rf"\b{access}\.E[.\w]*\.({widths})\b", code)
        assert sum(int(bits) // 8 for bits in wide) >= wanted, f"{what}: {access} {wide}"
