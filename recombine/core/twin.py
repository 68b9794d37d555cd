"""Copies of a model that hold no second copy of its weights."""

import copy
from collections.abc import Collection

from torch import nn


def sharing(model: nn.Module, apart: Collection[str] = ()) -> nn.Module:
    """A copy of the modules that holds the same parameters. Buffers are copied.

    What replaces layers or parameters of one leaves the other alone; what writes into a parameter, or sets its
    `requires_grad`, does not.

    Args:
        apart: names of modules whose parameters are copied too.
    """
    own = {id(p) for name in apart for p in model.get_submodule(name).parameters()}
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in own})


def unshare(twin: nn.Module, model: nn.Module) -> None:
    """Gives the twin copies of the parameters that train in the model; the model keeps those that were shared."""
    trains = {id(p) for p in model.parameters() if p.requires_grad}
    copies: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for module in twin.modules():
        for name, p in module._parameters.items():
            if id(p) in trains:
                copies.setdefault(id(p), nn.Parameter(p.detach().clone(), requires_grad=False))
                module._parameters[name] = copies[id(p)]
