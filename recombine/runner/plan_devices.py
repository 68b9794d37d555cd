"""The machine that a plan is for: this one, timed for a second or two, or one of a table."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from recombine.errors import UsageError, did_you_mean
from recombine.runner import limits

GB = 10**9
USED, STREAMED, FACTORED = 0.4, 0.7, 0.02  # shares of a data sheet's numbers that programs reach, assumed
HALF = torch.bfloat16


@dataclass(frozen=True)
class Device:
    """What a plan knows of a machine.

    memory: bytes. products: FLOPs a second of matrix products, by dtype. stream: bytes a second of all else.
    factoring: FLOPs a second of factorisations. gpu: it is one. how: where the numbers come from, in words.
    """

    name: str
    memory: int
    products: dict[torch.dtype, float]
    stream: float
    factoring: float
    gpu: bool = True
    how: str = f"assumed: {USED:.0%} of its peak, {STREAMED:.0%} of its bandwidth, {FACTORED:.0%} for factorisations"

    def seconds(self, cost: "Cost") -> float:
        """How long it takes."""
        slowest = min(self.products.values())
        products = sum(flops / self.products.get(dtype, slowest) for dtype, flops in cost.products.items())
        return products + cost.moved / self.stream + cost.factoring / self.factoring


@dataclass
class Cost:
    """Work: FLOPs of products by dtype, FLOPs of factorisations, bytes that all else reads and writes."""

    products: Counter = field(default_factory=Counter)
    factoring: float = 0.0
    moved: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        products = Counter({k: self.products[k] + other.products[k] for k in {*self.products, *other.products}})
        return Cost(products, self.factoring + other.factoring, self.moved + other.moved)

    def __mul__(self, times: float) -> "Cost":
        products = Counter({dtype: flops * times for dtype, flops in self.products.items()})
        return Cost(products, self.factoring * times, self.moved * times)

    @classmethod
    def of(cls, watch) -> "Cost":
        """What a `footprint.Watch` has counted so far."""
        return cls(Counter(watch.products), watch.factoring, watch.moved)


def _gpu(name: str, gigabytes: float, half: float, single: float, double: float, stream: float) -> Device:
    """A row of the table: TFLOP/s of bfloat16 (without sparsity), float32 and float64, and GB/s."""
    peaks = {HALF: half, torch.float16: half, torch.float32: single, torch.float64: double}
    products = {dtype: USED * peak * 1e12 for dtype, peak in peaks.items()}
    return Device(name, int(gigabytes * GB), products, STREAMED * stream * GB, FACTORED * double * 1e12)


TABLE = {  # NVIDIA's data sheets
    device.name: device
    for device in (
        _gpu("h200_141gb", 141, 989, 67, 67, 4800),
        _gpu("h100_80gb", 80, 989, 67, 67, 3350),
        _gpu("a100_80gb", 80, 312, 19.5, 19.5, 2039),
        _gpu("a100_40gb", 40, 312, 19.5, 19.5, 1555),
        _gpu("l40s_48gb", 48, 362, 91.6, 1.43, 864),
        _gpu("rtx4090_24gb", 24, 165, 82.6, 1.29, 1008),
        _gpu("v100_32gb", 32, 125, 15.7, 7.8, 900),
    )
}


def require_known(name: str) -> None:
    """Refuses a device that is in no table.

    Raises:
        UsageError: names those that are.
    """
    known = ["here", *TABLE]
    if name not in known:
        near = did_you_mean(name, known)
        raise UsageError(f"stage.device={name}: there is no such device; {near}choose from {', '.join(known)}")


def find(name: str, accelerator: str, timed: bool = True) -> Device:
    """The device of that name. here: the GPU that the run would take, or else the processor.

    Args:
        accelerator: of the trainer.
        timed: `here` is timed; otherwise its speed is a guess.

    Raises:
        UsageError: there is no such device.
    """
    require_known(name)
    return TABLE[name] if name != "here" else here(accelerator in ("auto", "gpu", "cuda"), timed)


def here(gpu: bool, timed: bool) -> Device:
    """This machine. gpu: a run would take its GPU, where it has one."""
    gpu = gpu and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    name = torch.cuda.get_device_name() if gpu else f"this machine ({torch.get_num_threads()} threads)"
    memory = torch.cuda.get_device_properties(0).total_memory if gpu else limits.memory()
    if not timed:
        guess = 1e14 if gpu else 5e10 * torch.get_num_threads()
        return Device(name, memory, {torch.float32: guess}, guess / 10, guess / 10, gpu, "guessed")
    size = 4096 if gpu else 768
    products = {}
    for dtype in (torch.float32, torch.float64, HALF):
        a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        products[dtype] = 2 * size**3 / least(lambda a=a, b=b: a @ b, gpu)
    products[torch.float16] = products[HALF] if gpu else products[torch.float32] / 10
    x = torch.ones(2**24 if gpu else 2**21, device=device)
    stream = 2 * x.nbytes / least(lambda: F.gelu(x), gpu)
    square = torch.randn(256, 256, dtype=torch.float64, device=device)
    factoring = 26 * 256**3 / least(lambda: torch.linalg.svd(square), gpu)
    return Device(name, memory, products, stream, factoring, gpu, "timed for a second")


def least(work: Callable[[], object], gpu: bool, times: int = 3) -> float:
    """The least seconds of a few tries, after one that warms up."""
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        work()
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
