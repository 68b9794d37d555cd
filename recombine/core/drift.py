"""How the inputs of layers drift while a model is compressed: moments of x in the original model and z in the new one.

The layers come group by group, those of one input together, in the model's order. Whoever takes them replaces each
group before asking for the next, so z is what the compressed layers before it give.

Where the blocks form a chain (`stream.py`), two sets of hidden states go from block to block, the original's and the
compressed model's. A block runs only as far as the layers that are measured. Elsewhere a copy that shares the original
weights runs beside the model, on all batches for every group.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn

from recombine.core.calibration import Losses, capture_attention_mask, eval_frozen, over
from recombine.core.kept import Kept
from recombine.core.layer_statistics import added, tokens, valid
from recombine.core.sites import Site, block_of, source
from recombine.core.stream import Chain, NoChain
from recombine.core.twin import sharing
from recombine.errors import UsageError
from recombine.models import roles
from recombine.runtime import progress
from recombine.runtime.mapped import release

Moments = tuple[Tensor, Tensor]  # E[x z^T] and E[z z^T], both (n, n) in float64


class Seen(Exception):
    """All layers that are measured have been called."""


class Sums:
    """The running sums of a group of layers.

    Args:
        sites: of the compressed model. twin: holds the original layers under the same names, without `prefix`.
        mask: of `capture_attention_mask`.
        stop: end the forward pass once the last of the layers is called, where the first one called each of them once.
    """

    def __init__(self, sites: list[Site], twin: nn.Module, prefix: str, mask: list[Tensor | None], stop: bool):
        self.mask, self.may_stop, self.stop = mask, stop, False
        self.layers = {site.name: (twin.get_submodule(site.name[len(prefix) :]), site.module) for site in sites}
        self.inputs: tuple[dict[str, list[Tensor]], ...] = ({}, {})  # x and z of each layer in this batch, by call
        self.sums: dict[tuple[str, ...], tuple[Tensor, Tensor, int]] = {}  # by the layers that read the same

    def __enter__(self) -> "Sums":
        def look(name: str, side: int, _, args: tuple) -> None:
            self.inputs[side].setdefault(name, []).append(args[0])
            if self.stop and len(self.inputs[side]) == len(self.layers):
                raise Seen

        self.hooks = [
            layer.register_forward_pre_hook(partial(look, name, side))
            for name, pair in self.layers.items()
            for side, layer in enumerate(pair)
        ]
        return self

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()

    def add(self) -> None:
        """Adds what the layers have got; those that got the same tensors share their sums.

        Raises:
            UsageError: a layer was not called, or not as often as in the original model.
        """
        self.stop = self.may_stop and all(len(calls) == 1 for side in self.inputs for calls in side.values())
        alike: dict[tuple[int, ...], list[str]] = {}
        for name in self.layers:
            calls = [side.get(name, []) for side in self.inputs]
            if not calls[1] or len(calls[0]) != len(calls[1]):
                raise UsageError(
                    f"calibration: {name} was not called while the model ran; leave its role out of targets"
                )
            alike.setdefault(tuple(id(x) for side in calls for x in side), []).append(name)
        for names in alike.values():
            for x, z in zip(*(side[names[0]] for side in self.inputs), strict=True):
                keep = valid(self.mask, x)
                x, z = tokens(x, keep), tokens(z, keep)
                cross, own, count = self.sums.get(tuple(names), (0.0, 0.0, 0))
                self.sums[tuple(names)] = added(cross, x.T @ z), added(own, z.T @ z), count + len(x)
        for side in self.inputs:
            side.clear()

    def means(self) -> dict[str, Moments]:
        """The moments, by site name. Layers that always got the same tensors share theirs.

        Raises:
            UsageError: they are not finite.
        """
        found: dict[tuple, Moments] = {}
        of = {name: tuple(names for names in self.sums if name in names) for name in self.layers}
        for name, keys in of.items():
            if keys in found:
                continue
            cross, own, counts = zip(*(self.sums[key] for key in keys), strict=True)
            found[keys] = over(sum(cross), sum(counts)), over(sum(own), sum(counts))
            if not all(moment.isfinite().all() for moment in found[keys]):
                raise UsageError(f"calibration: the inputs of {name} are not finite; use float32 or other batches")
        return {name: found[keys] for name, keys in of.items()}


def drifts(
    model: nn.Module, sites: list[Site], losses: Losses, store: Kept
) -> Iterator[tuple[list[Site], dict[str, Moments]]]:
    """Groups of layers with their moments, by site name. Replace a group's layers before asking for the next.

    Args:
        sites: in the model's order; none is replaced yet.
        store: for hidden states that wait; it is empty, and is closed at the end.

    Raises:
        UsageError: a layer is not called, or its inputs are not finite.
    """
    blocks = roles.block_names(model)
    try:
        if not sites or None in {block_of(site.name, blocks) for site in sites}:
            raise NoChain("a layer is in no block")
        chain = Chain(model, blocks, losses, store)
    except NoChain:
        yield from beside(model, sites, losses)
    else:
        yield from along(chain, sites)
    finally:
        store.close(True)


def groups_of(sites: list[Site]) -> Iterator[list[Site]]:
    """Consecutive layers that read one input."""
    return (list(group) for _, group in groupby(sites, key=source))


def along(chain: Chain, sites: list[Site]) -> Iterator[tuple[list[Site], dict[str, Moments]]]:
    """`drifts` where the blocks form a chain."""
    numbers = range(len(chain.calls))
    with chain.quiet():
        for index in progress.of(range(len(chain.blocks)), "compressing", "blocks"):
            twin, prefix = sharing(chain.blocks[index]), f"{chain.names[index]}."
            pair = (twin, ""), (chain.blocks[index], "compressed " if index else "")  # the first block's inputs agree
            for group in groups_of([site for site in sites if site.name.startswith(prefix)]):
                mask: list[Tensor | None] = [None]
                with Sums(group, twin, prefix, mask, stop=True) as sums:
                    for number in numbers:
                        mask[0] = chain.calls[number].mask
                        for block, side in pair:
                            advance(chain, block, index, number, side)
                        sums.add()
                yield group, sums.means()
            for number in numbers:
                found = [advance(chain, block, index, number, side) for block, side in pair]
                for (_, side), after, y in zip(pair, ("", "compressed "), found, strict=True):
                    chain.store.drop(f"{side}{index} {number}")
                    chain.store[f"{after}{index + 1} {number}"] = {"x": y}
            release(twin.parameters())


@torch.no_grad()
def advance(chain: Chain, block: nn.Module, index: int, number: int, side: str) -> Tensor | None:
    """What a block, or its original, gives for hidden states that wait; None: it ended where all was seen.

    Args:
        number: of the call. side: of the name under which they wait.
    """
    x = chain.store[f"{side}{index} {number}"]["x"].clone()  # the block may write into it
    try:
        return chain.run(block, index, chain.calls[number], x)
    except Seen:
        return None


def beside(model: nn.Module, sites: list[Site], losses: Losses) -> Iterator[tuple[list[Site], dict[str, Moments]]]:
    """`drifts` of any model."""
    twin = sharing(model).eval()
    for group in progress.of(list(groups_of(sites)), "compressing", "groups"):
        with (
            capture_attention_mask(model) as mask,
            eval_frozen(model),
            torch.no_grad(),
            Sums(group, twin, "", mask, stop=False) as sums,
            original_first(model, twin),
        ):
            for _ in losses():
                sums.add()
        yield group, sums.means()


@contextmanager
def original_first(model: nn.Module, twin: nn.Module) -> Iterator[None]:
    """Calls the twin with whatever the model is called with, before it."""

    def call(_, args: tuple, kwargs: dict) -> None:
        twin(*args, **kwargs)

    hook = model.register_forward_pre_hook(call, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
