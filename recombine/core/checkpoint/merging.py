"""Turns recombined layers back into ordinary ones."""

from torch import nn

from recombine.core.places import kept_around
from recombine.core.rollback import HELD
from recombine.core.tied import declare_tied
from recombine.errors import UsageError
from recombine.layers import PackedLinear
from recombine.models.fused_qkv import close
from recombine.models.wrappers import unwrapped


def merge(model: nn.Module) -> nn.Module:
    """Turns every recombined layer back into an ordinary linear one, in place; returns the model.

    The outputs stay the same; packed weights are dense again. Of adapters the one that is on stays in them, and others
    are dropped. Afterwards every parameter is trainable that was not frozen before the first method. Hooks of a layer
    stay. A layer of a subclass of nn.Linear is of that class again, unless the subclass holds state.

    Raises:
        UsageError: the model is not recombined.
    """
    wrapped, model = model, unwrapped(model)
    if (record := getattr(model, "recombined", None)) is None:
        raise UsageError(f"this {type(model).__name__} is not recombined: there is nothing to merge")
    with kept_around(model):
        for name in record.targets:
            model.set_submodule(name, merged(model.get_submodule(name)))
        for name, layer in [*model.named_modules()]:
            if isinstance(layer, PackedLinear):  # that no method rewrote
                model.set_submodule(name, layer.merged())
        freeze(model, record.frozen)
        close(model)
    del model.recombined
    vars(model).pop(HELD, None)  # adapters that are not on have no place in what is left
    declare_tied(model)
    freeze(model, record.frozen)  # a fused qkv has its name again
    return wrapped


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
