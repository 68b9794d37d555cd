"""Rehearses a run on torch's meta device: its own code, phase by phase, without weights, data or memory."""

import warnings
from dataclasses import replace
from math import ceil

from recombine import data
from recombine.core.memory import KEPT, SHARE
from recombine.runner import plan_alike
from recombine.runner.config import RunSpec
from recombine.runner.plan_devices import Device
from recombine.runner.plan_parts import Phase, Rehearsal
from recombine.runner.plan_player import Player
from recombine.runner.plan_stream import STREAMED
from recombine.runtime import logs, memory, progress

FEW = 2  # blocks of a deep model that are rehearsed, and twice as many; times the layers that share a basis
SHARED: dict[str, Rehearsal] = {}


def rehearse(spec: RunSpec, device: Device) -> Rehearsal:
    """What the run takes on the device. Runs that take the same share one rehearsal.

    Raises:
        UsageError: as `rehearsed` does.
    """
    if (key := plan_alike.key(spec, data.build(**spec.data), device)) not in SHARED:
        SHARED[key] = rehearsed(spec, device)
    return SHARED[key]


def rehearsed(spec: RunSpec, device: Device) -> Rehearsal:
    """What the run takes on the device.

    A deep model whose blocks are alike is rehearsed with a few of them, twice, and the rest follows in a straight line.

    Raises:
        UsageError: the run cannot be: an unknown role, a field out of range, data that the model cannot read.
    """
    with logs.quiet(), progress.display(False), warnings.catch_warnings():  # methods speak of values that are not there
        warnings.simplefilter("ignore")
        few = FEW * max(getattr(m, "group_size", 1) for m in (spec.method, spec.compressor or spec.method))
        player = Player(spec, device, few)
        if player.depth is None or player.depth < 3 * few:
            told = Player(spec, device, None).play()
        else:
            large = Player(spec, device, 2 * few).play()  # first: what that cannot rehearse, the small one leaves
            told = extended(player.play(), large, (player.depth - few) / few)
        return limited(told, spec, device, player.depth or 1) if told.digests else told


def limited(told: Rehearsal, spec: RunSpec, device: Device, depth: int) -> Rehearsal:
    """What a run takes whose statistics and factors keep to calibration.memory: less at once, and more passes.

    How a compressor or a method alone is calibrated, `plan_stream` says. Of an adapter that is calibrated after a
    compressor, block by block is taken for granted where two blocks of so many have room.
    """
    limit = memory.parse(spec.settings.calibration.memory, "calibration.memory")
    limit = int(SHARE * (device.memory - told.weights)) if limit is None else limit
    room, phases, sums = max(1, int((1 - KEPT) * limit)), [], told.sums
    for phase in told.phases:
        held, cost = dict(phase.held), phase.cost
        if "statistics" in held:
            passes, most = told.passes, sums
            if most is None:
                passes, most = ceil(held["statistics"] / room), room
                passes = min(passes, STREAMED) if 2 * held["statistics"] / depth <= room else passes
            cost = cost * passes if phase.name == "calibrate" else cost
            held["statistics"] = min(held["statistics"], most)
        if "factors" in held:
            held["factors"] = min(held["factors"], max(0, limit - held.get("statistics", 0)))
        sums = None if phase.name == "rewrite" else sums  # of the first method alone
        phases.append(Phase(phase.name, held, cost))
    return replace(told, phases=phases)


def extended(small: Rehearsal, large: Rehearsal, times: float) -> Rehearsal:
    """The rehearsal of a deeper model, on the line through two others. times: of their difference beyond the first."""

    def on(a: float, b: float) -> int:
        return max(0, round(a + times * (b - a)))

    phases = []
    for a, b in zip(small.phases, large.phases, strict=True):
        held = {part: on(a.held.get(part, 0), b.held[part]) for part in b.held}
        phases.append(Phase(b.name, held, None if b.cost is None else a.cost + (b.cost + a.cost * -1.0) * times))
    parameters = {key: on(small.parameters[key], large.parameters[key]) for key in large.parameters}
    changed, weights = on(small.changed, large.changed), on(small.weights, large.weights)
    return replace(large, parameters=parameters, phases=phases, changed=changed, weights=weights)
