"""Calibrates a method pass by pass, and has it digest every group of layers as soon as its statistics are complete."""

import hashlib
from dataclasses import asdict

from torch import nn

from recombine.core.calibration import Losses, collect
from recombine.core.memory import device_of
from recombine.core.method import Method, need_losses
from recombine.core.sites import Site
from recombine.core.untouched import total
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
    for part in method.memory.passes(groups, kinds, device_of(model)):
        method.stats = collect(model, [site for group in part for site in group], losses, kinds)
        for group in progress.of(part, "factors", "groups"):
            method.digested(group)
            for site in group:
                del method.stats[site.name]


def stamp(method: Method, sites: list[Site], kinds: set[str]) -> str:
    """What a digest depends on, beside the data, in hex: the method's fields, the statistics and the weights."""
    weights = [(site.name, total(site.module.weight)) for site in sites]
    return hashlib.sha256(repr((type(method).__name__, asdict(method), sorted(kinds), weights)).encode()).hexdigest()
