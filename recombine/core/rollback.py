"""Leaves a model as it was: where rewriting it fails, or after a trial."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

HELD = "recombine_adapters"  # attribute of a model that holds adapters (core/adapters)
CONTAINERS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")  # what a module keeps its parts in


@contextmanager
def unchanged(model: nn.Module | None, only_on_failure: bool = False) -> Iterator[None]:
    """Puts every module, attribute and parameter back when the block ends, an interruption (Ctrl-C) included.

    No tensor is copied: what the block replaces lives until it ends, and values that are written into a tensor stay.

    Args:
        only_on_failure: the changes stay where the block ends well.
    """
    modules = [] if model is None else list(model.modules())
    states = [(dict(vars(m)), {key: vars(m)[key].copy() for key in CONTAINERS}) for m in modules]
    tensors = [] if model is None else [(p, p.data, p.requires_grad) for p in model.parameters()]
    config = getattr(model, "config", None)
    told = dict(vars(config)) if hasattr(config, "__dict__") else None
    ended_well = False
    try:
        yield
        ended_well = True
    finally:
        if not (ended_well and only_on_failure):
            for module, (attributes, contents) in zip(modules, states, strict=True):
                vars(module).clear()
                vars(module).update(attributes)
                for key, content in contents.items():
                    vars(module)[key].clear()
                    vars(module)[key].update(content)
            for p, data, trains in tensors:
                p.data, p.requires_grad = data, trains
            if told is not None:
                vars(config).clear()
                vars(config).update(told)


def unchanged_on_failure(model: nn.Module | None):
    """`unchanged`, where the block fails."""
    return unchanged(model, only_on_failure=True)
