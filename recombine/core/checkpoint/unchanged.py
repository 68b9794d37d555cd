"""A model that is rewritten for a trial, or that a failure must leave as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

TREES = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")  # what a module keeps its parts in


@contextmanager
def unchanged(model: nn.Module, only_on_error: bool = False) -> Iterator[None]:
    """Puts the model's modules, parameters, flags and configuration back when the block ends. Nothing is copied.

    Values that are written into tensors stay: the block must replace tensors, or write last.

    Args:
        only_on_error: the changes stay where the block ends well.
    """
    before = [
        (module, dict(vars(module)), {key: vars(module)[key].copy() for key in TREES}) for module in model.modules()
    ]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    config = getattr(model, "config", None)
    told = dict(vars(config)) if hasattr(config, "__dict__") else None
    ended_well = False
    try:
        yield
        ended_well = True
    finally:
        if not (ended_well and only_on_error):
            for module, attributes, trees in before:
                vars(module).clear()
                vars(module).update(attributes)
                for key, tree in trees.items():
                    vars(module)[key] = tree
            for p, flag in flags:
                p.requires_grad_(flag)
            if told is not None:
                vars(config).clear()
                vars(config).update(told)
