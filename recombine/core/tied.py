"""Parameters that several layers share, declared where transformers asks for them before it writes a checkpoint."""

from collections.abc import Callable
from types import MethodType

from torch import nn

leaving: list[Callable] = []  # the last one is `save_pretrained` of every recombined model; `recombine.export` adds it


def declare_tied(model: nn.Module) -> None:
    """Adds the recombined layers' shared parameters to a transformers model's `_tied_weights_keys`, or drops old ones.

    `save_pretrained` and Trainer's checkpoints refuse tensors that are shared and not declared. Other models are left
    alone. A model that is not recombined any more declares what its class does. What a recombined model's
    `save_pretrained` writes is what `recombine.export` does: transformers' own folder would load with random weights.
    """
    known = getattr(model, "_tied_weights_keys", None) or {}
    theirs = {name: source for name, source in known.items() if not name.endswith("$")}
    shared = shared_in_targets(model) if hasattr(model, "recombined") else {}
    # transformers reads the names as regular expressions; the $ marks ours
    wanted = theirs | {f"{name}$": source for name, source in shared.items()}
    if hasattr(model, "_tied_weights_keys") and wanted != known:
        model._tied_weights_keys = wanted
    if leaving and hasattr(model, "save_pretrained"):
        vars(model).pop("save_pretrained", None)
        if hasattr(model, "recombined"):  # a bound method: a copy of the model binds its own
            model.save_pretrained = MethodType(leaving[-1], model)


def shared_in_targets(model: nn.Module) -> dict[str, str]:
    """Name of the first use of every shared parameter of the recombined layers, by the names of its further uses."""
    first = {id(p): name for name, p in model.named_parameters()}
    inside = tuple(f"{target}." for target in model.recombined.targets)
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in every if first[id(p)] != name and name.startswith(inside)}
