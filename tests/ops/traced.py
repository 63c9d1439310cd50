"""What a call of a head does on a GPU, kernel by kernel, from fake tensors: no GPU, no numbers.

The model: a kernel takes the longer of its FLOP at RATE and its bytes at BANDWIDTH, and kernels run
one after another. It knows nothing of launches, of caches, or of a product's last wave.
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
from recorder import KERNELS
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sepo_kernels import devices, triton_rows

# what large kernels reach on an H200: of 989 TFLOP/s in bfloat16, and of 4.8 TB/s
RATE, BANDWIDTH = 790e12, 4.3e12
H200 = (132, 150 * 10**9)  # multiprocessors, bytes of memory

PRODUCTS = {"mm", "addmm", "addmm_"}
EMPTY = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
GATHERS = {"index_select", "gather", "index"}


class Kernel(NamedTuple):
    name: str
    flop: int
    bytes: int  # read and written

    @property
    def seconds(self) -> float:
        return max(self.flop / RATE, self.bytes / BANDWIDTH)


class Trace(NamedTuple):
    kernels: list[Kernel]

    @property
    def ms(self) -> float:
        return 1e3 * sum(k.seconds for k in self.kernels)

    @property
    def products(self) -> list[Kernel]:
        return [k for k in self.kernels if k.name in PRODUCTS]

    @property
    def rows(self) -> list[Kernel]:  # the Triton kernels
        return [k for k in self.kernels if _is_triton(k)]

    @property
    def others(self) -> list[Kernel]:
        """Sums, casts, copies and whatever else is neither a product nor a row kernel."""
        return [k for k in self.kernels if k.name not in PRODUCTS and not _is_triton(k)]

    def gigabytes(self) -> dict[str, float]:
        """Outside of the products, by the kind of operation."""
        found = Counter()
        for k in self.rows + self.others:
            found[k.name] += k.bytes
        return {name: round(n / 1e9, 2) for name, n in found.most_common() if n >= 5e6}


def trace(call: Callable[[], object], gpu: tuple[int, int] = H200) -> Trace:
    """The kernels of `call`, which makes its tensors on "cuda" itself."""
    found: list[Kernel] = []

    def launch(kernel, rows, columns, *args, **flags):
        # each tensor is read or written once: one program reads its own elements
        found.append(Kernel(f"triton {kernel.fn.__name__}", 0, _bytes(args)))

    with (
        mock.patch.object(devices, "_gpu", lambda device: gpu),
        mock.patch.object(triton_rows, "launch", launch),
        FakeTensorMode(),
        _Recorder(found),
    ):
        call()
    return Trace(found)


class _Recorder(TorchDispatchMode):
    def __init__(self, found: list[Kernel]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if name in KERNELS:  # an opaque node: run its kernel under this mode
            with self, _Indexing():
                return KERNELS[name][args[-1]](*args[:-1], **kwargs)
        if (
            name == "addmm" and "out" in kwargs
        ):  # by a decomposition, whose copy asks for the device
            out = _summed(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        moves = isinstance(out, Tensor) and name not in EMPTY and not _is_same(name, args)
        if moves and not (func.is_view and torch._C._is_alias_of(out, args[0])):
            self.found.append(Kernel(name, _flop(name, args), _moved(name, args, out)))
        return out


class _Indexing(TorchFunctionMode):
    """Indexing and copies by ATen's own operations: Python's ask for the device, which is not there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__getitem__:
            return _part(*args)
        if func is Tensor.__setitem__:
            return torch.ops.aten.copy_.default(_part(*args[:2]), args[2])
        if func is Tensor.copy_:
            return torch.ops.aten.copy_.default(*args)
        return func(*args, **(kwargs or {}))


def _summed(total: Tensor, a: Tensor, b: Tensor, out_dtype=None, *, out: Tensor) -> Tensor:
    assert out is total and total.dtype == (out_dtype or a.dtype) and a.dtype == b.dtype
    assert total.shape == (a.shape[0], b.shape[1]) and a.shape[1] == b.shape[0]
    return out


def _part(x: Tensor, index) -> Tensor:
    dim = 0
    for i in index if isinstance(index, tuple) else (index,):
        if i is None:
            x = x.unsqueeze(dim)
        elif isinstance(i, int):
            x = x.select(dim, i)
            continue
        elif i != slice(None):
            x = torch.ops.aten.slice(x, dim, i.start, i.stop)
        dim += 1
    return x


def _is_triton(kernel: Kernel) -> bool:
    return kernel.name.startswith("triton ")


def _flop(name: str, args) -> int:
    if name not in PRODUCTS:
        return 0
    a, b = (x for x in args if isinstance(x, Tensor)) if name == "mm" else args[1:3]
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]


def _moved(name: str, args, out) -> int:
    if name in GATHERS:  # not all of what is selected from
        return 2 * _bytes(out)
    if name == "index_put_":  # the rows that are added to, read and written
        return 3 * args[2].nbytes
    if name == "copy_":
        return _bytes(args[:2])
    if name in ("zero_", "fill_") or name.startswith("new_"):
        return _bytes(out)
    return _bytes(args) + _bytes(out)  # in place: read and written


def _is_same(name: str, args) -> bool:
    """x[i] += y ends with a copy of a view to itself, which ATen leaves out."""
    if name != "copy_":
        return False
    a, b = args[:2]
    return torch._C._is_alias_of(a, b) and a.storage_offset() == b.storage_offset()


def _bytes(tensors) -> int:
    return sum(x.nbytes for x in tree_leaves(tensors) if isinstance(x, Tensor))
