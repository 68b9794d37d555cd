"""Copies of a model that hold no second copy of its weights."""

import copy

from torch import Tensor, nn


def sharing(model: nn.Module, buffers: bool = False) -> nn.Module:
    """A copy of the modules that holds the same parameters.

    What replaces layers or parameters of one leaves the other alone; what writes into a parameter, or sets its
    `requires_grad`, does not.

    Args:
        buffers: they are the same too; otherwise they are copied.
    """
    same = [*model.parameters(), *(model.buffers() if buffers else ())]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in same})


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the model's structure whose parameters and buffers are the model's own memory.

    It stays as it was when modules or parameters of the model are replaced, and not when values are written into them.
    """
    memo: dict[int, Tensor] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo | {id(b): b for b in model.buffers()})


def unshare(twin: nn.Module, model: nn.Module) -> None:
    """Gives the twin copies of the parameters that train in the model; the model keeps those that were shared."""
    trains = {id(p) for p in model.parameters() if p.requires_grad}
    copies: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for module in twin.modules():
        for name, p in module._parameters.items():
            if id(p) in trains:
                copies.setdefault(id(p), nn.Parameter(p.detach().clone(), requires_grad=False))
                module._parameters[name] = copies[id(p)]
