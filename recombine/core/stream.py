"""Calibration block by block, where a model's blocks form a chain: the output of each is the input of the next.

The model runs once with blocks that hand on what they get. That tells what each block is called with beside the hidden
states. Then all batches go through the first block, all through the second, and so on. For gradients the model ends
with its own loss, and all batches come back through the last block, the one before it, and so on, each block's outputs
computed again from its inputs.

So the statistics of one block are held at a time. A block's weights are read once, or twice for gradients, and go back
to the system in between where they are pages of a file. Hidden states that wait lie in files where they are too large.
The statistics are those of `calibration.collect`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from recombine.core.calibration import Losses, Sums, capture_attention_mask, eval_frozen, need_graph
from recombine.core.kept import Kept
from recombine.core.layer_statistics import BACKWARD, Stats
from recombine.core.places import standing_for
from recombine.core.sites import Site
from recombine.runtime import progress
from recombine.runtime.mapped import release

PLAIN = (type(None), bool, int, float, str, Tensor)  # what a block may get beside the hidden states


class NoChain(Exception):
    """The blocks are no chain."""


class Call(NamedTuple):
    """A call of the model: its attention mask, and what each block got beside the hidden states."""

    mask: Tensor | None
    beside: list[tuple[tuple, dict[str, Any]]]


class Watch(TorchDispatchMode):
    """Refuses operations of torch while `between` two blocks."""

    between = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.between:
            raise NoChain(f"{func} runs between two blocks")
        return func(*args, **(kwargs or {}))


class Chain:
    """The blocks of a model, and what each of them is called with.

    Args:
        blocks: their module names, in order.
        losses: as for `collect`.
        store: for hidden states that wait; it is empty.

    Raises:
        NoChain: a block gets something else than the output of the one before, or gives more than hidden states. That
            a block writes into its input shows in the sweep, before any statistics of it.
    """

    def __init__(self, model: nn.Module, blocks: list[str], losses: Losses, store: Kept):
        self.model, self.losses, self.store = model, losses, store
        self.names, self.blocks = blocks, [model.get_submodule(name) for name in blocks]
        self.calls: list[Call] = []
        self.batches: list[list[int]] = []  # of each batch, which calls it makes
        self.more: tuple | None = None  # a block gives hidden states and these; None: hidden states as they are
        self.last: Tensor | None = None  # what the block before gave
        with capture_attention_mask(model) as mask, self.quiet(), torch.no_grad():
            self.watch = Watch()
            with self.watch, self.through(partial(self.record, mask)):
                for _ in losses():
                    self.batches.append([*range(sum(map(len, self.batches)), len(self.calls))])

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """The model in eval mode, frozen, and without a cache of keys and values unless a call asks for one."""
        config = getattr(self.model, "config", None)
        cached = getattr(config, "use_cache", False)
        with eval_frozen(self.model):
            try:
                if cached:
                    config.use_cache = False
                yield
            finally:
                if cached:
                    config.use_cache = cached

    def through(self, forward: Callable) -> AbstractContextManager[None]:
        """Calls forward(index, *args, **kwargs) in the place of each block."""
        return standing_for({block: partial(forward, index) for index, block in enumerate(self.blocks)})

    def record(self, mask: list[Tensor | None], index: int, *args, **kwargs):
        """What stands for a block in the first run: hands on its input."""
        self.watch.between = False
        if not args or not isinstance(args[0], Tensor) or not all(map(plain, [*args[1:], *kwargs.values()])):
            raise NoChain("a block gets something else than tensors and numbers")
        x = args[0]
        if x.is_inference():
            raise NoChain("what is written into a tensor of inference mode cannot be told")
        if index == 0:
            self.store[f"0 {len(self.calls)}"] = {"x": x}
            self.calls.append(Call(mask[0], []))
        elif x is not self.last or len(self.calls[-1].beside) != index:
            raise NoChain("a block does not get the output of the one before it")
        self.calls[-1].beside.append((args[1:], kwargs))
        if len(self.calls) == 1 and index == 0:
            given = type(self.blocks[0]).forward(self.blocks[0], x.clone(), *args[1:], **kwargs)
            self.more = given[1:] if isinstance(given, tuple) else None
            if any(value is not None for value in self.more or ()) or not isinstance(self.hidden(given), Tensor):
                raise NoChain("a block gives more than hidden states")
        self.last, self.watch.between = x, index + 1 < len(self.blocks)
        return self.given(x)

    def given(self, x: Tensor) -> Tensor | tuple:
        """What a block gives whose hidden states are these."""
        return x if self.more is None else (x, *self.more)

    def hidden(self, given: Tensor | tuple) -> Tensor:
        """The hidden states of what a block gives."""
        return given if self.more is None else given[0]

    def block(self, index: int, call: Call, x: Tensor) -> Tensor:
        """The output of a block.

        Raises:
            NoChain: the block writes into its input, which is needed again.
        """
        version = x._version
        y = self.run(self.blocks[index], index, call, x)
        if x._version != version:
            raise NoChain("a block writes into its input")
        return y

    def run(self, block: nn.Module, index: int, call: Call, x: Tensor) -> Tensor:
        """The hidden states that a block in the place of that index gives for hidden states x."""
        args, kwargs = call.beside[index]
        return self.hidden(block(x, *args, **kwargs))

    def sweep(self, sites: list[list[Site]], wanted: set[str], done: Callable[[dict[str, Stats]], None]) -> None:
        """Collects statistics block by block.

        Args:
            sites: of each block, the layers.
            wanted: kinds of statistics.
            done: takes the statistics of a block's layers, by site name.

        Raises:
            UsageError: as `collect` does.
        """
        backward = bool(wanted & BACKWARD)
        with self.quiet():
            for index in progress.of(range(len(self.blocks)), "calibrating", "blocks"):
                self.forward(index, [] if backward else sites[index], wanted, done, keep=backward)
            if backward:
                self.gradients()
                for index in progress.of(reversed(range(len(self.blocks))), "gradients", "blocks"):
                    self.backward(index, sites[index], wanted, done)

    def forward(self, index: int, sites: list[Site], wanted: set[str], done: Callable, keep: bool) -> None:
        """Takes all batches through a block."""
        mask: list[Tensor | None] = [None]
        with Sums(sites, wanted, mask) as sums, torch.no_grad():
            for batch in self.batches:
                for number in batch:
                    mask[0] = self.calls[number].mask
                    y = self.block(index, self.calls[number], self.store[f"{index} {number}"]["x"])
                    if not keep:
                        self.store.drop(f"{index} {number}")
                    self.store[f"{index + 1} {number}"] = {"x": y}
                sums.end_batch()
        if sites:
            done(sums.means())
        release(self.blocks[index].parameters())  # `done` reads them

    def gradients(self) -> None:
        """Ends the model with its own loss, and keeps the loss's gradients by the last block's outputs."""
        ends: list[Tensor] = []

        def hand_on(index: int, x: Tensor, *args, **kwargs):
            if index + 1 == len(self.blocks):
                x = self.store[f"{index + 1} {len(ends)}"]["x"].detach().requires_grad_()
                ends.append(x)
            return self.given(x)

        with self.through(hand_on), torch.enable_grad():
            before = 0
            for loss in self.losses():
                need_graph(loss).backward()
                for number in range(before, len(ends)):
                    grad = ends[number].grad
                    self.store.drop(f"{len(self.blocks)} {number}")
                    self.store[f"gradient {number}"] = {"x": torch.zeros_like(ends[number]) if grad is None else grad}
                    ends[number] = ends[number].detach()[:0]
                before = len(ends)

    def backward(self, index: int, sites: list[Site], wanted: set[str], done: Callable) -> None:
        """Takes all batches' gradients back through a block."""
        mask: list[Tensor | None] = [None]
        with Sums(sites, wanted, mask) as sums, torch.enable_grad():
            for batch in self.batches:
                for number in batch:
                    mask[0] = self.calls[number].mask
                    x = self.store[f"{index} {number}"]["x"].detach().requires_grad_()
                    self.block(index, self.calls[number], x).backward(self.store[f"gradient {number}"]["x"])
                    for name in (f"{index} {number}", f"gradient {number}"):
                        self.store.drop(name)
                    self.store[f"gradient {number}"] = {"x": x.grad}
                sums.end_batch()
        if sites:
            done(sums.means())
        release(self.blocks[index].parameters())  # `done` reads them


def plain(value: Any) -> bool:
    """Whether a block computes the same with it at any time: no cache, no state."""
    return all(map(plain, value)) if isinstance(value, tuple) else isinstance(value, PLAIN)
