"""Turns recombined layers back into ordinary ones."""

from torch import nn

from recombine.errors import UsageError
from recombine.models.fused_qkv import fuse


def merge(model: nn.Module) -> nn.Module:
    """Turns every recombined layer back into an ordinary linear one, in place; returns the model.

    The outputs stay the same. Afterwards every parameter is trainable.

    Raises:
        UsageError: the model is not recombined.
    """
    if (record := getattr(model, "recombined", None)) is None:
        raise UsageError(f"this {type(model).__name__} is not recombined: there is nothing to merge")
    for name in record.targets:
        model.set_submodule(name, merged(model.get_submodule(name)))
    fuse(model)
    del model.recombined
    return model.requires_grad_(True)


def merged(layer: nn.Module) -> nn.Module:
    """The ordinary layer with the same outputs, whatever methods were applied to it and in which order."""
    if hasattr(layer, "get_base_layer"):  # peft
        layer.base_layer = merged(layer.get_base_layer())
        layer.merge()
        return layer.get_base_layer()
    return layer.merged() if callable(getattr(layer, "merged", None)) else layer
