"""How a model computes while it trains: compiled, with blocks computed again, with fast products.

All of it ends with the training. Names of weights and modules stay what they are.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from recombine.core.places import standing_for
from recombine.errors import UsageError, did_you_mean
from recombine.models import roles
from recombine.models.recompute import recompute
from recombine.training.settings import TrainerSettings

SHAPES = 4  # of a block's inputs: whole batches and the last one, with and without a mask


@contextmanager
def engaged(model: nn.Module, settings: TrainerSettings) -> Iterator[None]:
    """Until the block ends, the model computes as `trainer` says.

    Raises:
        UsageError: it cannot.
    """
    with ExitStack() as stack:
        stack.enter_context(products(settings.matmul))
        stack.enter_context(recomputed(model, settings.gradient_checkpointing))
        if settings.compile:
            stack.enter_context(compiled(model, backend(settings)))
        yield


@contextmanager
def recomputed(model: nn.Module, on: bool) -> Iterator[None]:
    """Until the block ends, the backward pass computes each block of the model again, where that is on.

    Raises:
        UsageError: the model cannot.
    """
    if on:
        recompute(model, True)
    try:
        yield
    finally:
        if on:
            recompute(model, False)


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Until the block ends, products of float32 matrices are as exact as that: highest, high or medium."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def backend(settings: TrainerSettings) -> str:
    """torch.compile's backend for the settings' device.

    Raises:
        UsageError: torch has no such backend, or the default one finds no compiler for the device.
    """
    if settings.compile is not True and settings.compile != "inductor":
        if settings.compile not in (known := torch._dynamo.list_backends(None)):
            hint = did_you_mean(settings.compile, known) or f"choose true or one of {', '.join(known)}"
            raise UsageError(f"trainer.compile={settings.compile}: torch has no such backend; {hint.strip()}")
        return settings.compile
    if settings.accelerator == "cpu" or not torch.cuda.is_available():
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            fix = "install g++, or set trainer.compile=false"
            raise UsageError(f"trainer.compile={settings.compile}: there is no C++ compiler; {fix}") from error
    elif not torch.utils._triton.has_triton():
        fix = "install triton, or set trainer.compile=false"
        raise UsageError(f"trainer.compile={settings.compile}: there is no Triton for this GPU; {fix}")
    return "inductor"


@contextmanager
def compiled(model: nn.Module, backend: str | Callable) -> Iterator[None]:
    """Until the block ends, each block of the model is compiled where it trains. In eval mode it runs as it is.

    Blocks of the same shapes share what is compiled. Others are compiled anew, beyond torch's limit of eight too.
    """
    blocks = roles.blocks(model) or [model]
    limit = 8 + SHAPES * len(blocks)
    with standing_for({block: where_it_trains(block, backend, limit) for block in blocks}):
        yield


def where_it_trains(block: nn.Module, backend: str | Callable, limit: int) -> Callable:
    """The block's forward: compiled in training mode, its own in eval mode. limit: how often it may be compiled."""
    own = block.forward
    fast = torch.compile(own, backend=backend, recompile_limit=limit)

    def forward(*args, **kwargs):
        return (fast if block.training else own)(*args, **kwargs)

    return forward
