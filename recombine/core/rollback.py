"""Leaves a model as it was where rewriting it fails."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

CONTAINERS = ("_parameters", "_buffers", "_modules")


@contextmanager
def unchanged_on_failure(model: nn.Module | None) -> Iterator[None]:
    """Puts every module, attribute and parameter back where the block raises, an interruption (Ctrl-C) included.

    No tensor is copied: what the block replaces lives until it ends, and values that are written into a tensor stay.
    """
    modules = [] if model is None else list(model.modules())
    states = [(dict(vars(m)), {key: dict(vars(m)[key]) for key in CONTAINERS}) for m in modules]
    tensors = [] if model is None else [(p, p.data, p.requires_grad) for p in model.parameters()]
    try:
        yield
    except BaseException:
        for module, (attributes, contents) in zip(modules, states, strict=True):
            vars(module).clear()
            vars(module).update(attributes)
            for key, content in contents.items():
                vars(module)[key].clear()
                vars(module)[key].update(content)
        for p, data, trains in tensors:
            p.data, p.requires_grad = data, trains
        raise
