"""Structural pruning: neurons, heads, channels or whole blocks are cut out, and ordinary, smaller modules stay.

Any method can adapt what is left. A checkpoint holds the new shapes of parameters, the new values of modules'
attributes and the blocks that are left. So loading prunes nothing again.
"""

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from recombine.core.method import Method, Site
from recombine.errors import UsageError
from recombine.models import roles


@dataclass(kw_only=True)
class Structural(Method, abstract=True):
    """The base of the methods that cut. Everything but the head trains in distillation, the head in adaptation."""

    compresses: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        self.structure: dict[str, Any] | None = None  # what `rewrite` changed, for `to_spec`

    def prune(self, model: nn.Module, sites: list[Site]) -> None:
        """Cuts the model, in place. Blocks that are not in `self.blocks` are gone by then."""
        raise NotImplementedError(type(self).__name__)

    def rewrite(self, model: nn.Module, sites: list[Site], losses=None) -> None:
        if self.blocks is not None:
            keep_blocks(model, self.blocks)
        before = outline(model)
        self.prune(model, sites)
        after = outline(model)
        changed = {
            part: {key: value for key, value in after[part].items() if before[part].get(key, value) != value}
            for part in after
        }
        self.structure = {"blocks": self.blocks} | changed

    def to_spec(self, model: nn.Module, names: list[str]) -> dict[str, dict]:
        structure = self.structure or model.recombined.steps[-1].layers["structure"]  # the latter: after `finish`
        return {"structure": structure} | super().to_spec(model, names)

    def from_spec(self, model: nn.Module, layers: dict[str, dict]) -> None:
        layers = dict(layers)
        reshape(model, layers.pop("structure"))
        super().from_spec(model, layers)

    def distillation_parameters(self, model: nn.Module) -> set[str]:
        head = {id(p) for p in h.parameters()} if (h := roles.head(model)) is not None else set()
        return {name for name, p in model.named_parameters() if id(p) not in head}


def comes_first(method: Method, model: nn.Module) -> None:
    """Checks that no other method was applied before.

    Raises:
        UsageError: the model is recombined already.
    """
    if hasattr(model, "recombined"):
        raise UsageError(
            f"{type(method).__name__} cuts a pretrained model: apply it first, other methods to what is left"
        )


def outline(model: nn.Module) -> dict[str, dict]:
    """Everything that pruning can change, as JSON can hold it.

    Returns:
        shapes: of parameters, by name. attributes: numbers, by "module.attribute". config: numbers of a Hugging Face
        model's config, by key.
    """
    return {
        "shapes": {name: list(p.shape) for name, p in model.named_parameters()},
        "attributes": {
            f"{name}.{key}": value
            for name, module in model.named_modules()
            for key, value in numbers(module).items()
            if not key.startswith("_")
        },
        "config": numbers(model.config) if hasattr(model, "config") else {},
    }


def numbers(thing: object) -> dict[str, Any]:
    """The attributes that are numbers or tuples of integers; a tuple becomes a list, as in JSON."""
    values = {}
    for key, value in vars(thing).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            values[key] = value
        elif isinstance(value, tuple) and value and all(isinstance(v, int) for v in value):
            values[key] = list(value)
    return values


def reshape(model: nn.Module, structure: dict[str, Any]) -> None:
    """Gives a pretrained model the structure of a pruned one, in place; tensors of another shape are empty.

    Args:
        structure: blocks, shapes, attributes and config, as `Structural.rewrite` recorded them.
    """
    if structure["blocks"] is not None:
        keep_blocks(model, structure["blocks"])
    if structure["config"]:
        reconfigure(model, **structure["config"])
    for path, value in structure["attributes"].items():
        name, _, key = path.rpartition(".")
        if key not in numbers(model.get_submodule(name)):
            raise UsageError(f"{name} of this model has no number {key}")
        setattr(model.get_submodule(name), key, tuple(value) if isinstance(value, list) else value)
    for path, shape in structure["shapes"].items():
        name, _, key = path.rpartition(".")
        old = model.get_parameter(path)
        setattr(model.get_submodule(name), key, nn.Parameter(old.new_empty(shape), requires_grad=False))


def keep_blocks(model: nn.Module, kept: Collection[int]) -> None:
    """Drops all blocks but those with the indices `kept`, in place.

    The rest move up. A Hugging Face model's config and the blocks' places in its key-value cache follow.
    """
    names = roles.block_names(model)
    for i in reversed(range(len(names))):
        if i not in kept:
            container, _, position = names[i].rpartition(".")
            del model.get_submodule(container)[int(position)]
    for i, block in enumerate(roles.blocks(model)):
        for module in block.modules():
            if hasattr(module, "layer_idx"):  # the layer's place in the key-value cache
                module.layer_idx = i
    if hasattr(model, "config"):
        reconfigure(model, num_hidden_layers=len(kept))


def say_neurons(owner: nn.Module, old: int, new: int) -> None:
    """Sets what an MLP says of its width, such as LlamaMLP."""
    if getattr(owner, "intermediate_size", None) == old:
        owner.intermediate_size = new


def reconfigure(model: nn.Module, **values: int) -> None:
    """Sets entries of a Hugging Face model's config, such as num_hidden_layers=6.

    The config is copied first, since other models may share the old one.
    """
    old, new = model.config, copy.deepcopy(model.config)
    for key, value in values.items():
        setattr(new, key, value)
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new
