"""Puts a checkpoint's tensors into a model that has its layers."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from recombine.core.untouched import near
from recombine.errors import UsageError


def fill(path: Path, model: nn.Module, tensors: dict[str, Tensor], meta: dict) -> None:
    """Copies a checkpoint's tensors into a model that they fit, once the backbone is known to be the same.

    Raises:
        UsageError: the backbone differs from the one saved with.
    """
    present = named_tensors(model, tensors)
    for name, p in present.items():
        if p.is_meta:
            raise UsageError(f"{path}: {name} of the given model is on the meta device; give a model with weights")
    for name, expected in meta["own"].items():
        tolerance = 1e-5 if present[name].dtype == torch.float32 else 1e-2
        if not near(present[name], expected, tolerance):
            raise UsageError(
                f"{path}: {name} differs from the backbone it was saved with; load the same pretrained one"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            present[name].copy_(tensor)


def assign(model: nn.Module, tensors: dict[str, Tensor], meta: dict) -> None:
    """Puts a file's tensors themselves into a model that they fit, so that nothing is copied."""
    buffers = dict(model.named_buffers())
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if name in buffers:
            module._buffers[leaf] = tensor
        else:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    for name, source in meta["shared"].items():
        set_parameter(model, name, model.get_parameter(source))


def named_tensors(model: nn.Module, further: Iterable[str]) -> dict[str, Tensor]:
    """Parameters, buffers that a state dict holds, and further buffers of these names, each once, by name."""
    kept = {*model.state_dict(), *further}
    return dict(model.named_parameters()) | {name: b for name, b in model.named_buffers() if name in kept}


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Puts a parameter at a dotted name of the model."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)
