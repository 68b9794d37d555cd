"""What work takes, found by doing it on tensors without memory (torch's meta device): bytes, products, factorisations.

`Watch` runs the real code of models and methods. It adds up the storages that are alive at each moment, and what every
operation would have computed and moved. A number that would be read from a tensor is not known there. It is taken to be
one, and a mask to hold everywhere, so that what data decide is at its largest.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward  # torch.autograd.backward without a look at function modes
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from recombine.core import remembered

aten = torch.ops.aten
FUSED, FUSED_BACKWARD = (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
)
FACTORING: dict = {  # operation -> FLOPs for (long side, short side) (Golub & Van Loan, Matrix Computations, 4th ed.)
    aten._linalg_svd.default: lambda m, n: 6 * m * n**2 + 20 * n**3,  # R-SVD with thin factors
    aten._linalg_eigh.default: lambda m, n: 9 * n**3,
    aten.linalg_qr.default: lambda m, n: 4 * m * n**2,
    aten.linalg_cholesky_ex.default: lambda m, n: n**3 / 3,
    aten.linalg_solve_triangular.default: lambda m, n: m * n**2,
    aten._linalg_solve_ex.default: lambda m, n: 2 * n**3 / 3,
    aten.linalg_pinv.atol_rtol_tensor: lambda m, n: 9 * n**3,
}
META = torch.device("meta")
MOST = 45_000  # operations that a plan waits for, some seconds
PRODUCTS = (F.linear, F.conv1d, F.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.einsum)


class Endless(Exception):
    """What was watched took more operations than a plan waits for: it waits for values that are not there."""


class Watch(TorchDispatchMode):
    """Counts what runs while it is entered.

    live, peak: bytes of the storages that are alive, now and at most. products: FLOPs by dtype. factoring: FLOPs of
    factorisations. moved: bytes that all other operations read and write.

    Args:
        held: tensors that are alive at the start.
    """

    def __init__(self, held: Iterable[Tensor] = ()):
        super().__init__()
        self.live = self.peak = self.moved = 0
        self.products: Counter[torch.dtype] = Counter()
        self.factoring = 0.0
        self.operations = 0
        self.known: dict[int, weakref.ref] = {}
        self.see(held)

    def see(self, tensors: Iterable[Tensor]) -> None:
        """Takes the storages of these tensors as alive until they are freed."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if (key := storage._cdata) not in self.known:
                size = storage.nbytes()
                self.known[key] = weakref.ref(storage, lambda _, key=key, size=size: self.freed(key, size))
                self.live += size
        self.peak = max(self.peak, self.live)

    def freed(self, key: int, size: int) -> None:
        """A storage is gone."""
        if self.known.pop(key, None) is not None:
            self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.operations += 1
        if self.operations > MOST:
            raise Endless
        given = inside((args, kwargs))
        if func is aten._local_scalar_dense.default and given[0].is_meta:
            return {torch.bool: True}.get(given[0].dtype, 1.0 if given[0].is_floating_point() else 1)
        if func is aten.equal.default and given[0].is_meta:
            return True
        if func is aten._to_copy.default and given[0].is_meta and kwargs.get("device") is not None:
            kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking")}
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            args = (args[0], [place for index in args[1] for place in everywhere(index)], *args[2:])
        elif func is aten.nonzero.default and given[0].is_meta:
            func, args, kwargs = aten.new_empty.default, (given[0], [given[0].numel(), given[0].ndim]), {}
            kwargs["dtype"] = torch.long
        out = remembered.call(func, args, kwargs, given)
        made = inside(out)
        ghost = func is aten.empty.memory_format and kwargs.get("device") == META  # has no memory in a real run either
        if not (ghost or func._schema.is_mutable):
            self.see(made)
        self.count(func, args, kwargs, out, given, made)
        return out

    def count(self, func, args, kwargs, out, given: list[Tensor], made: list[Tensor]) -> None:
        """Adds what an operation computes or moves."""
        if func in FACTORING:
            *batch, m, n = given[0].shape
            self.factoring += FACTORING[func](max(m, n), min(m, n)) * torch.Size(batch).numel()
        elif func is FUSED:
            self.products[given[0].dtype] += sdpa_flop_count(*(x.shape for x in given[:3]))
        elif func is FUSED_BACKWARD:
            self.products[given[0].dtype] += sdpa_backward_flop_count(*(x.shape for x in given[:4]))
        elif func._overloadpacket in flop_registry:
            self.products[given[0].dtype] += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        elif not func.is_view and func._overloadpacket not in (aten.detach, aten.new_empty, aten.empty):
            self.moved += sum(x.nbytes for x in (*given, *made))


def inside(values: object) -> list[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    return [tensor for value in values for tensor in inside(value)]


def everywhere(index: Tensor | None) -> list[Tensor | None]:
    """A mask as the indices of all its places, one tensor a dimension; any other index as it is."""
    if index is None or not index.is_meta or index.dtype != torch.bool:
        return [index]
    return [torch.empty(index.numel(), dtype=torch.long, device="meta") for _ in index.shape]


class Kernels(TorchFunctionMode):
    """What a device does otherwise than the meta device: fused attention, and products in half precision.

    Args:
        half: the dtype that autocast gives to products; None: there is no autocast.
        dropout: the device's fused attention knows dropout.
    """

    def __init__(self, half: torch.dtype | None = None, dropout: bool = False):
        super().__init__()
        self.half, self.dropout = half, dropout

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.backward and args[0].ndim == 0:  # checkpointed blocks run again in it, by the same kernels
            with self:
                return _engine_run_backward(args, (torch.ones_like(args[0]),), False, False, (), True, True)
        if self.half is not None and (func in PRODUCTS or func is F.scaled_dot_product_attention):
            args, kwargs = cast(args, self.half), cast(kwargs, self.half)
        if func is F.scaled_dot_product_attention:
            return attend(*args, dropout_known=self.dropout, **kwargs)
        return func(*args, **kwargs)


def cast(values, half: torch.dtype):
    """Float32 tensors in half precision, in whatever holds them."""
    if isinstance(values, Tensor):
        return values.to(half) if values.dtype == torch.float32 else values
    if isinstance(values, tuple | list):
        return type(values)(cast(value, half) for value in values)
    return {k: cast(v, half) for k, v in values.items()} if isinstance(values, dict) else values


def attend(
    q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, dropout_known=False
) -> Tensor:
    """Scaled dot-product attention, fused where a device fuses it: then no (T, T) matrix is kept."""
    plain = attn_mask is None or not attn_mask.requires_grad
    if q.ndim == 4 and q.shape[-1] == v.shape[-1] and plain and (dropout_known or not dropout_p):
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        if attn_mask is not None:
            attn_mask = attn_mask.to(q.dtype) if attn_mask.dtype == torch.bool else attn_mask
        return FUSED(q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def tensors(model: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a model."""
    return [*model.parameters(), *model.buffers()]


def size(found: Iterable[Tensor]) -> int:
    """Bytes of these tensors; a storage that several share counts once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in found}
    return sum(storages.values())


def apart(found: Iterable[Tensor], known: Iterable[Tensor]) -> int:
    """Bytes of these tensors whose storages no known one has."""
    there = {t.untyped_storage()._cdata for t in known}
    return size(t for t in found if t.untyped_storage()._cdata not in there)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient."""
    return [p for p in model.parameters() if p.requires_grad]


def step(model: nn.Module, loss: Callable[[], Tensor], kernels: Kernels, held: Iterable[Tensor] = ()) -> Watch:
    """One training step without its optimizer. `peak` is then what it takes beside the weights, gradients included.

    The gradients of the step before are alive until its forward is through, as in Lightning's loop.

    Args:
        held: other tensors that are alive, such as a teacher's.
    """
    known = [*tensors(model), *held]
    watch = Watch(known)
    gradients = size(trained(model))
    with watch, kernels:
        value = loss()
        forward = watch.peak + gradients
        if value.requires_grad:
            value.backward()
    watch.peak = max(forward, watch.peak) - size(known)
    for p in model.parameters():
        p.grad = None
    return watch


def forward(call: Callable[[], object], known: list[Tensor], kernels: Kernels) -> Watch:
    """What a forward without gradients takes. known: the tensors that are alive before it. `peak` is without them."""
    watch = Watch(known)
    with watch, kernels, torch.no_grad():
        call()
    watch.peak -= size(known)
    return watch
