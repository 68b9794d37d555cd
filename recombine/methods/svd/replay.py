"""Runs a model again from the first block that differs: the blocks before it give what they gave."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from recombine.core.places import standing_for
from recombine.core.sites import block_of
from recombine.models import roles

PLAIN = (int, float, bool, str, type(None))


class Replay:
    """What every block of a model gave in one call.

    Nothing is left out where a block ran twice, gave something that may change behind its back, or had its output
    written into afterwards, and where all that the blocks gave takes more than the room.

    Args:
        room: bytes.
    """

    def __init__(self, model: nn.Module, room: int):
        self.room = room
        self.names = roles.block_names(model)
        self.blocks = [model.get_submodule(name) for name in self.names]
        self.given: dict[int, tuple[Any, list[tuple[Tensor, int]] | None]] = {}  # in the order in which they ran
        self.noting, self.twice, self.held = True, False, 0

    @contextmanager
    def notes(self) -> Iterator[None]:
        """Takes down what the blocks give while the block of code runs, as long as `noting` says so."""
        hooks = [block.register_forward_hook(partial(self.note, i)) for i, block in enumerate(self.blocks)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def note(self, index: int, block: nn.Module, args: tuple, output: Any) -> None:
        """A forward hook of a block."""
        if not self.noting:
            return
        told = versions(output)
        self.twice = self.twice or index in self.given
        self.held += sum(tensor.numel() * tensor.element_size() for tensor, _ in told or ())
        if self.held > self.room:
            self.noting = False
            self.given.clear()
        else:
            self.given[index] = output, told

    def forget(self) -> None:
        """Begins anew, for the model's next call."""
        self.given.clear()
        self.noting, self.twice, self.held = True, False, 0

    def skipping(self, changed: Sequence[str]) -> AbstractContextManager[None]:
        """Leaves out the blocks that ran before the first one that holds a changed layer. changed: module names."""
        return standing_for({self.blocks[i]: partial(again, self.given[i][0]) for i in self.before(changed)})

    def before(self, changed: Sequence[str]) -> list[int]:
        """The indices of the blocks that may be left out, in the order in which they ran."""
        order, holders = list(self.given), {block_of(name, self.names) for name in changed}
        if self.twice or not holders <= set(order):
            return []
        first = order[: min(map(order.index, holders), default=0)]
        same = all(
            told is not None and all(tensor._version == version for tensor, version in told)
            for told in (self.given[i][1] for i in first)
        )
        return first if same else []


def again(output: Any, *args, **kwargs) -> Any:
    """The forward of a block that is left out."""
    return output


def versions(output: Any) -> list[tuple[Tensor, int]] | None:
    """The tensors of an output, each with the number of writes into it; None: that cannot be told of all it holds."""
    if isinstance(output, Tensor):
        return None if output.is_inference() else [(output, output._version)]
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, tuple | list):
        parts = [versions(part) for part in output]
        return None if None in parts else [pair for part in parts for pair in part]
    return [] if isinstance(output, PLAIN) else None
