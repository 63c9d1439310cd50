"""Arithmetics that a CPU has no switch for: TF32 products, and float64 without a narrower step."""

import re
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import sepo.ops  # noqa: F401  (registers sepo::selected_logprob_fwd)
from sepo_kernels.halves import to_tf32

aten = torch.ops.aten
# matrix products, and where their operands stand among the arguments
PRODUCTS = {
    aten.mm: (0, 1),
    aten.bmm: (0, 1),
    aten.addmm: (1, 2),
    aten.baddbmm: (1, 2),
    torch.ops.sepo.selected_logprob_fwd: (0, 1),  # hidden and head; the rest of it is float32
}
# names of operations that may multiply matrices inside
SUSPECT = re.compile(r"mm|mv|dot|matmul|linear|attention|conv|einsum|addr|cdist|lstm|gru|rnn")


@contextmanager
def tf32():
    """Compute float32 models as with TF32: operands of products rounded, sums in float32."""
    # fused attention is one operation from outside; the math backend shows both of its products
    with sdpa_kernel(SDPBackend.MATH), RoundedProducts():
        yield


class RoundedProducts(TorchDispatchMode):
    """Rounds both operands of every float32 matrix product to TF32.

    Raises NotImplementedError for an operation that may hold a product it can't reach.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if operands := PRODUCTS.get(func.overloadpacket):
            args = [to_tf32(x) if i in operands else x for i, x in enumerate(args)]
        elif func.namespace != "aten" or SUSPECT.search(func.overloadpacket.__name__):
            raise NotImplementedError(f"{func}: expected no product but {[*map(str, PRODUCTS)]}")
        return func(*args, **(kwargs or {}))


class Float64Only(TorchFunctionMode):
    """Makes float64 of every float32 that a float64 model asks for.

    transformers' norms, rotary embeddings and softmax round to float32 whatever the model is in.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.float:
            func = Tensor.double
        args = [_widened(x) for x in args]
        return func(*args, **{name: _widened(x) for name, x in (kwargs or {}).items()})


def _widened(x):
    return torch.float64 if x is torch.float32 else x
