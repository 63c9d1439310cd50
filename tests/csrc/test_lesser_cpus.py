"""On a CPU without AVX-512 or AVX2 the right library is loaded, and nothing is an illegal instruction.

qemu stands for the CPU; torch itself runs there too, in half a minute. oneDNN's own switch stands for
a lesser library.
"""

import shutil
import subprocess
import sys

import pytest
from processes import ENVIRONMENT

CODE = """
import torch
import sepo.ops as ops
from sepo_kernels import extension

torch.manual_seed(0)
print(torch.backends.cpu.get_cpu_capability(), extension.LEVEL, extension.BFLOAT16_TILES)
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
    hidden, weight = torch.randn(20, 32, dtype=dtype), torch.randn(257, 32, dtype=dtype)
    hidden.requires_grad_()
    rows, targets = torch.arange(0, 20, 2, dtype=torch.int32), torch.randint(257, (10,))
    logp = ops.selected_logprob(hidden, weight, rows, targets, impl="native")
    logp.sum().backward()
    x = hidden.detach().double().requires_grad_()
    dense = torch.log_softmax(x[rows] @ weight.double().T, -1).gather(1, targets[:, None])[:, 0]
    dense.sum().backward()
    torch.testing.assert_close(logp.double(), dense, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(hidden.grad.double(), x.grad, rtol=tolerance, atol=5 * tolerance)
score, cu = torch.randn(100), torch.tensor([0, 30, 100], dtype=torch.int32)
index, _ = ops.segment_topk(score, cu, 0.3, "highest", impl="native")
assert index[:9].tolist() == sorted(score[:30].topk(9).indices.tolist())
total = ops.segment_sum(score, cu)
torch.testing.assert_close(total, torch.stack([score[:30].sum(), score[30:].sum()]))
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-x86_64 on PATH")
@pytest.mark.native
@pytest.mark.parametrize("cpu, level", [("Haswell", "AVX2"), ("Nehalem", "DEFAULT")])
def test_on_a_lesser_cpu(cpu, level):
    env = {k: v for k, v in ENVIRONMENT.items() if k not in ("SEPO_CPU", "ATEN_CPU_CAPABILITY")}
    command = ["qemu-x86_64", "-cpu", cpu, sys.executable, "-c", CODE]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{level} {level} False\n"


@pytest.mark.native
@pytest.mark.parametrize("most", ["AVX512_CORE", "AVX2"])
def test_where_onednn_is_held_to_less_than_the_cpu_has(most):
    """It may have no bfloat16 tiles where the CPU does: that is asked, not an error at import."""
    env = ENVIRONMENT | {"ONEDNN_MAX_CPU_ISA": most}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "False"
