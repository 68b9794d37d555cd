"""Turns recombined layers back into ordinary ones, one at a time: the old ones of a model are never all held."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from recombine.core.places import one_by_one
from recombine.core.rollback import HELD, unchanged
from recombine.core.tied import declare_tied
from recombine.core.twin import sharing
from recombine.errors import UsageError
from recombine.layers import PackedLinear
from recombine.models.fused_qkv import close
from recombine.models.wrappers import unwrapped
from recombine.runtime.mapped import on_disk


def merge(model: nn.Module) -> nn.Module:
    """Turns every recombined layer back into an ordinary linear one, in place; returns the model.

    The outputs stay the same; packed weights are dense again. Of adapters the one that is on stays in them, and others
    are dropped. Afterwards every parameter is trainable that was not frozen before the first method. Hooks of a layer
    stay. A layer of a subclass of nn.Linear is of that class again, unless the subclass holds state.

    Raises:
        UsageError: the model is not recombined.
    """
    wrapped, model = model, unwrapped(model)
    if not hasattr(model, "recombined"):
        raise UsageError(f"this {type(model).__name__} is not recombined: there is nothing to merge")
    merge_layers(model, merged, one_by_one(model))
    return wrapped


def merged_copy(model: nn.Module, folder: Path | None) -> nn.Module:
    """A merged copy of a recombined model, which is not changed.

    Every other tensor is the model's own, and what is built anew becomes pages of nameless files as soon as it is
    there. On a GPU it stays.

    Args:
        folder: in which those files lie; None: the system's for temporary files.

    Raises:
        UsageError: the disk is full.
    """
    own = {id(p) for p in model.parameters()}
    twin = sharing(model)
    there = one_by_one(twin)

    def put(name: str, layer: nn.Module) -> None:
        for p in layer.parameters():
            if id(p) not in own and p.ndim > 1 and p.device.type == "cpu":
                p.data = on_disk(p.data, folder)
        there(name, layer)

    def build(layer: nn.Module) -> nn.Module:
        if hasattr(layer, "get_base_layer"):  # peft writes into its base
            own_parameters(layer.get_base_layer())
        return merged(layer)

    with unchanged(model):  # what is frozen is set
        merge_layers(twin, build, put)
    return twin


def merge_layers(
    model: nn.Module, build: Callable[[nn.Module], nn.Module], put: Callable[[str, nn.Module], None]
) -> None:
    """Merges a model in place. build: as `merged`. put: puts a layer in the place of that name."""
    frozen = model.recombined.frozen
    for name in model.recombined.targets:
        put(name, build(model.get_submodule(name)))
    for name in [name for name, layer in model.named_modules() if isinstance(layer, PackedLinear)]:
        put(name, build(model.get_submodule(name)))  # that no method rewrote
    freeze(model, frozen)
    close(model, put)
    del model.recombined
    vars(model).pop(HELD, None)  # adapters that are not on have no place in what is left
    declare_tied(model)
    freeze(model, frozen)  # a fused qkv has its name again


def own_parameters(layer: nn.Module) -> None:
    """Puts copies in the place of a layer's parameters."""
    for module in layer.modules():
        for name, p in module._parameters.items():
            module._parameters[name] = None if p is None else nn.Parameter(p.detach().clone(), p.requires_grad)


def freeze(model: nn.Module, names: set[str]) -> None:
    """Freezes exactly these parameters; names that are not in the model are left out."""
    for name, p in model.named_parameters():
        p.requires_grad_(name not in names)


def merged(layer: nn.Module) -> nn.Module:
    """The ordinary layer with the same outputs, whatever methods were applied to it and in which order."""
    if hasattr(layer, "get_base_layer"):  # peft
        layer.base_layer = merged(layer.get_base_layer())
        layer.merge()
        return layer.get_base_layer()
    return layer.merged() if callable(getattr(layer, "merged", None)) else layer
