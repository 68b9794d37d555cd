"""Calibrates a method pass by pass, and has it digest every group of layers as soon as its statistics are complete."""

import hashlib
from dataclasses import asdict
from typing import NamedTuple

from torch import nn

from recombine.core.calibration import Losses, collect
from recombine.core.layer_statistics import Stats
from recombine.core.memory import device_of
from recombine.core.method import Method, need_losses
from recombine.core.sites import Site, block_of
from recombine.core.stream import Chain, NoChain
from recombine.core.untouched import total
from recombine.models import roles
from recombine.runtime import progress


def calibrate(model: nn.Module, method: Method, sites: list[Site], losses: Losses | None, kinds: set[str]) -> None:
    """Collects statistics of these kinds (of `calibration.KINDS`) into the method's `stats`, or digests them.

    Raises:
        UsageError: there are no losses, no batch reached a layer, a statistic is not finite, or the memory does not
            hold one layer.
    """
    need_losses(method, losses)
    if type(method).digest is Method.digest:
        method.stats = collect(model, sites, losses, kinds)
        return
    if method.memory.folder is not None:
        method.kept.find(stamp(method, sites, kinds))
    groups = [group for group in method.groups(sites) if group[0].name not in method.kept]
    found = way(model, method, groups, kinds)
    if found.blocks is not None and streamed(model, method, groups, found.blocks, losses, kinds):
        return
    for part in found.passes:
        method.stats = collect(model, [site for group in part for site in group], losses, kinds)
        for group in progress.of(part, "factors", "groups"):
            method.digested(group)
            for site in group:
                del method.stats[site.name]


class Way(NamedTuple):
    """How a calibration goes. passes: over the data, each with its groups of layers. blocks: the layers of each block,
    where it goes block by block if these turn out to be a chain; None: it does not."""

    passes: list[list[list[Site]]]
    blocks: list[list[Site]] | None


def way(model: nn.Module, method: Method, groups: list[list[Site]], kinds: set[str]) -> Way:
    """How a calibration keeps to the method's memory: at once where the sums of all layers fit, else block by block
    where the blocks hold the layers, else in passes.

    Raises:
        UsageError: the memory does not hold one layer.
    """
    device, names = device_of(model), roles.block_names(model)
    passes = method.memory.passes(groups, kinds, device)
    inside = {site.name: block_of(site.name, names) for group in groups for site in group}
    by_block = [[site for group in groups for site in group if inside[site.name] == i] for i in range(len(names))]
    if len(passes) < 2 or None in inside.values():
        return Way(passes, None)
    return Way(passes, by_block if method.memory.holds(waiting(groups, by_block), kinds, device) else None)


def streamed(
    model: nn.Module,
    method: Method,
    groups: list[list[Site]],
    by_block: list[list[Site]],
    losses: Losses,
    kinds: set[str],
) -> bool:
    """Does the same block by block; False, and nothing is done: the blocks are no chain.

    Raises:
        UsageError: as `calibrate` does.
    """
    names, store = roles.block_names(model), method.memory.store(device_of(model), "hidden")
    left, method.stats = list(groups), {}

    def done(stats: dict[str, Stats]) -> None:
        method.stats |= stats
        for group in [group for group in left if method.stats.keys() >= {site.name for site in group}]:
            left.remove(group)
            method.digested(group)
            for site in group:
                del method.stats[site.name]

    try:
        Chain(model, names, losses, store).sweep(by_block, kinds, done)
    except NoChain:
        return False
    finally:
        store.close(True)
    return True


def waiting(groups: list[list[Site]], by_block: list[list[Site]]) -> list[list[Site]]:
    """For every block, in either direction, the layers whose statistics are there until their groups are complete."""
    place = {site.name: index for index, sites in enumerate(by_block) for site in sites}
    spans = [(min(found), max(found), group) for group in groups if (found := [place[site.name] for site in group])]
    return [[s for first, last, group in spans if first <= i <= last for s in group] for i in range(len(by_block))]


def stamp(method: Method, sites: list[Site], kinds: set[str]) -> str:
    """What a digest depends on, beside the data, in hex: the method's fields, the statistics and the weights."""
    weights = [(site.name, total(site.module.weight)) for site in sites]
    return hashlib.sha256(repr((type(method).__name__, asdict(method), sorted(kinds), weights)).encode()).hexdigest()
