"""What `optim.name` names: torch's optimizers, one whose state has 8 bits, and Muon beside AdamW."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from recombine.errors import UsageError
from recombine.training.settings import INSTALL

GPUS = ("cuda", "mps", "xpu")  # devices on which one kernel moves all weights


def adamw(groups: Sequence[dict], fused: bool = False) -> Optimizer:
    """AdamW. fused: one kernel moves all weights; the results differ in the last digits."""
    return clipped(torch.optim.AdamW(groups, fused=fused or None))


def adam(groups: Sequence[dict], fused: bool = False) -> Optimizer:
    """Adam, fused as `adamw` is."""
    return clipped(torch.optim.Adam(groups, fused=fused or None))


def clipped(optimizer: Optimizer) -> Optimizer:
    """The optimizer, of which Lightning clips gradients. It refuses to where one unscales gradients by itself, as fused
    ones do with float16; where `fusible` allows those, nothing is scaled."""
    optimizer._step_supports_amp_scaling = False
    return optimizer


def eight_bits() -> type[Optimizer]:
    """torchao's AdamW of 8 bits. Its import also lets torch.load read its training states.

    Raises:
        UsageError: torchao is not installed.
    """
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UsageError(f"optim.name=adamw_8bit: torchao cannot be imported ({error}); {INSTALL}") from error
    return AdamW8bit


def adamw_8bit(groups: Sequence[dict], fused: bool = False) -> Optimizer:
    """AdamW whose two moments are stored in 8 bits, where a tensor has 4096 entries or more (arXiv 2110.02861)."""
    return eight_bits()(groups)


class MuonAdamW(Optimizer):
    """Muon for groups with ``muon: True``, AdamW for the others, as one optimizer with one state.

    Muon moves a matrix by an orthogonal one (Newton-Schulz), scaled as large as AdamW's steps are (arXiv 2502.16982),
    so that one rate fits both. It knows matrices alone.
    """

    def __init__(self, groups: Sequence[dict], fused: bool = False):
        kinds = {
            True: lambda mine: torch.optim.Muon(mine, adjust_lr_fn="match_rms_adamw"),
            False: partial(adamw, fused=fused),
        }
        self.parts = {kind: make(mine) for kind, make in kinds.items() if (mine := of_kind(groups, kind))}
        super().__init__([group for part in self.parts.values() for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for kind, part in self.parts.items():  # a state that was loaded has other groups than before
            part.param_groups, part.state = of_kind(self.param_groups, kind), self.state
            part.step()
        return loss


def of_kind(groups: Sequence[dict], muon: bool) -> list[dict]:
    """The groups that Muon moves, or the others."""
    return [group for group in groups if group["muon"] is muon]


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {  # optim.name -> how it is made of groups, fused or not
    "adamw": adamw,
    "adam": adam,
    "sgd": lambda groups, fused=False: torch.optim.SGD(groups, momentum=0.9),
    "adamw_8bit": adamw_8bit,
    "muon": MuonAdamW,
}


def prepare(name: str) -> None:
    """Imports what an optimizer and its training states need.

    Raises:
        UsageError: it is not installed.
    """
    if name == "adamw_8bit":
        eight_bits()


def takes_muon(model: nn.Module, head: nn.Module | None) -> set[int]:
    """The ids of the parameters that Muon moves: matrices that are neither of the head nor of an embedding."""
    outer = [head, *(module for module in model.modules() if isinstance(module, nn.Embedding))]
    left_out = {id(p) for module in outer if module is not None for p in module.parameters()}
    return {id(p) for p in model.parameters() if p.ndim == 2 and id(p) not in left_out}


def fusible(device: torch.device, precision: str) -> bool:
    """Whether one kernel may move all weights. With 16-mixed it would unscale gradients after they are clipped."""
    return device.type in GPUS and precision != "16-mixed"


@torch.no_grad()
def scale_gradients(optimizer: Optimizer, factor: float) -> None:
    """Multiplies every gradient, in place."""
    if factor != 1:
        for gradient in [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]:
            gradient.mul_(factor)
