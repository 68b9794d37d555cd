"""Adapters of peft on a layer whose weight is read instead of called would train nothing, and nobody would say so."""

from collections.abc import Iterable

import torch
from torch import nn

from recombine.errors import UsageError


class CallWatch:
    """Looks on while a layer's owner runs for the first time, and refuses a layer that it does not call.

    An owner that reads `layer.weight` gets the base weight, without the adapter. Under torch.compile nothing is seen.
    """

    def __init__(self, name: str, layer: nn.Module, owner: nn.Module):
        self.name, self.called = name, False
        self.handles = [layer.register_forward_hook(self.on_call), owner.register_forward_hook(self.on_owner)]

    def on_call(self, *_) -> None:
        """Hook of the layer."""
        if not torch.compiler.is_compiling():
            self.called = True

    def on_owner(self, owner: nn.Module, *_) -> None:
        """Hook of the owner.

        Raises:
            UsageError: it ran without calling the layer.
        """
        if torch.compiler.is_compiling():
            return
        for handle in self.handles:
            handle.remove()
        if not self.called:
            why = "its adapter would train nothing; leave its role out of targets"
            raise UsageError(f"{self.name} is not called: its {type(owner).__name__} reads the weight, so {why}")


def watch_calls(model: nn.Module, names: Iterable[str]) -> None:
    """Puts a `CallWatch` on the layers of these names, which are gone after the first forward."""
    for name in names:
        CallWatch(name, model.get_submodule(name), model.get_submodule(name.rpartition(".")[0]))
