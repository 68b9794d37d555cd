"""The plan of a run: what it takes of memory, disk and time, whether a device holds it, and what would make it fit."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from math import ceil

from torch import nn

from recombine import data
from recombine.core.memory import SHARE
from recombine.data.base import DataModule, TokenModule
from recombine.errors import UsageError
from recombine.runner.config import RunSpec
from recombine.runner.ledger import duration
from recombine.runner.plan_devices import GB, Device, find
from recombine.runner.plan_parts import Rehearsal, build
from recombine.runner.plan_run import rehearse
from recombine.runner.plan_stream import paged
from recombine.runtime import memory
from recombine.training import distributed

LONG = 600  # seconds from which a run says at its start what it will take; shorter ones do not wait for a rehearsal
PATCH = 14  # pixels a side, for the guess
LEAST = ("weights", "gradients", "optimizer", "statistics")  # parts that are counted, not estimated
PAGED = "if they have the type that model.dtype says"
SPARE = 0.95  # of the memory; the rest is the driver's, the interpreter's and what lies between tensors
IMPORTS = int(0.7 * GB)  # bytes of memory that torch and the other libraries take on a processor
GUESSED = 5e10, 1e14  # FLOPs a second of a core and of a GPU, for the guess


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    told: its rehearsal. device: what it is planned for. seconds: of every phase; None: how much there is to do is not
    known. verdict: whether it fits, and what to do where it does not. downloads, pictures: bytes on the disk.
    """

    told: Rehearsal
    device: Device
    seconds: dict[str, float | None]
    verdict: str
    downloads: int
    pictures: int
    ranks: int

    @property
    def wall(self) -> float | None:
        """Seconds of the whole run; None: not known."""
        return None if None in self.seconds.values() else sum(self.seconds.values())

    @property
    def peak(self) -> int:
        """Bytes that the largest phase holds on one device."""
        return self.told.largest.bytes

    @property
    def least(self) -> int:
        """Bytes that one device must hold at the very least."""
        return least(self.told)

    def as_dict(self) -> dict:
        """What plan.json holds. Memory is in bytes, time in seconds."""
        return {
            "device": {"name": self.device.name, "memory": self.device.memory, "speed": self.device.how},
            "devices": self.ranks,
            "verdict": self.verdict,
            "parameters": self.told.parameters,
            "memory": {"peak": self.peak, "least": self.least, "phase": self.told.largest.name},
            "phases": {phase.name: phase.held | {"all": phase.bytes} for phase in self.told.phases},
            "disk": {"download": self.downloads, "pictures": self.pictures, "results": self.told.changed},
            "seconds": self.seconds | {"all": self.wall},
            "gpu_hours": None if self.wall is None or not self.device.gpu else self.wall * self.ranks / 3600,
            "samples": self.told.samples,
            "notes": self.told.notes,
        }

    def line(self) -> str:
        """The plan in one line."""
        time = "time not known before the data are" if self.wall is None else f"about {duration(self.wall)}"
        most = f"{gigabytes(self.peak)} at most ({self.told.largest.name})"
        return f"{most}, {time} on {self.device.name}: {self.verdict}"


def plan(spec: RunSpec, device: Device) -> Plan:
    """The plan of a run on a device.

    Raises:
        UsageError: the run cannot be, as `rehearse` says.
    """
    told = rehearse(spec, device)
    seconds = {p.name: None if p.cost is None else round(device.seconds(p.cost), 3) for p in told.phases}
    devices = spec.settings.trainer.devices
    verdict = judged(spec, told, device)
    size = spec.data.get("image_size") or spec.model.get("image_size") or 0
    pictures = sum(told.samples.values()) * 3 * size**2
    fetched = spec.model.get("pretrained", True) and spec.model.get("checkpoint") is None
    fetch = (told.weights + told.phases[0].held.get("frozen parts", 0)) * fetched
    return Plan(told, device, seconds, verdict, fetch, pictures, devices if isinstance(devices, int) else 1)


def least(told: Rehearsal) -> int:
    """Bytes of what is counted exactly, in the phase that holds most of it."""
    return max(sum(phase.held.get(part, 0) for part in LEAST) for phase in told.phases)


def beside_weights(told: Rehearsal) -> int:
    """Bytes of the largest phase without weights, old and new."""
    parts = ("weights", "new weights", "teacher")
    return max(phase.bytes - sum(phase.held.get(part, 0) for part in parts) for phase in told.phases)


def room(device: Device) -> float:
    """Bytes of a device that a run may fill."""
    return SPARE * device.memory - (0 if device.gpu else IMPORTS)


def judged(spec: RunSpec, told: Rehearsal, device: Device) -> str:
    """The verdict: fits, or the first way there is to make it fit."""
    if told.largest.bytes <= room(device):
        return "fits"
    if paged(spec, device) and beside_weights(told) <= room(device):
        return f"fits, but its weights do not: they are read from their files each time, {PAGED}"
    count = shards(told, device)
    divided = f"{count} GPUs of {gigabytes(device.memory)}: trainer=fsdp trainer.devices={count}"
    for keys, other in (*streams(spec, told, device), *ways(spec, device)):
        with suppress(UsageError):  # this model or method cannot
            if rehearse(other, device).largest.bytes > room(device):
                continue
            return f"does not fit {gigabytes(device.memory)}; {keys} does{f', or {divided}' if count else ''}"
    if count is not None:
        return f"needs {divided}"
    return f"does not fit {gigabytes(device.memory)}; the {told.largest.name} needs {gigabytes(told.largest.bytes)}"


def streams(spec: RunSpec, told: Rehearsal, device: Device) -> Iterator[tuple[str, RunSpec]]:
    """Smaller limits of a calibration that keeps to one, as typed: in smaller parts, to the same end."""
    if told.digests:
        given = spec.settings.calibration
        limit = memory.parse(given.memory, "calibration.memory") or SHARE * max(0, device.memory - told.weights)
        for part in (2, 4, 16):
            word = memory.shown(limit / part)
            settings = replace(spec.settings, calibration=replace(given, memory=word))
            yield f"calibration.memory={word}", replace(spec, settings=settings)


def ways(spec: RunSpec, device: Device) -> Iterator[tuple[str, RunSpec]]:
    """Changes of the run that may make it fit, as typed: those first that change least of what it computes."""
    settings, keys = spec.settings, ""
    if spec.model.get("gradient_checkpointing") is False and not settings.trainer.gradient_checkpointing:
        spec = replace(spec, model=spec.model | {"gradient_checkpointing": True})
        keys = "model.gradient_checkpointing=true"
        yield keys, spec
    if (size := settings.calibration.batch_size) > 1:
        smaller = replace(settings, calibration=replace(settings.calibration, batch_size=1))
        yield f"{keys} calibration.batch_size=1".strip(), replace(spec, settings=smaller)
    if (size := spec.data.get("batch_size", 1)) > 1:
        for part in sorted({max(1, size // 4), max(1, size // 16), 1}, reverse=True):
            yield f"{keys} data.batch_size={part}".strip(), replace(spec, data=spec.data | {"batch_size": part})
    if spec.model.get("dtype") == "float32":
        yield f"{keys} model.dtype=bfloat16".strip(), replace(spec, model=spec.model | {"dtype": "bfloat16"})


def shards(told: Rehearsal, device: Device) -> int | None:
    """How many GPUs hold a training in shards, each beside a whole copy of the weights; None: no number does."""
    if not device.gpu:
        return None
    count = 1
    for phase in told.phases:
        weights, gradients, moments = (phase.held.get(part, 0) for part in LEAST[:3])
        left = room(device) - phase.bytes
        if "gradients" in phase.held:
            left += gradients + moments
            count = max(count, ceil((weights + gradients + moments) / left)) if left > 0 else count
        if left <= 0:
            return None
    return count


def at_start(spec: RunSpec) -> None:
    """Says at the start of a long run what it will take.

    Raises:
        UsageError: this machine cannot hold it, whatever is not counted.
    """
    if distributed.rank() > 0:  # the first speaks for all
        return
    try:
        module = data.build(**spec.data)
        model = build(spec, module)
    except (NotImplementedError, RuntimeError, UsageError):  # what is wrong, the build that follows says
        return
    device = find("here", spec.settings.trainer.accelerator, timed=False)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if weights > device.memory and not paged(spec, device):
        raise UsageError(too_large(spec, f"{gigabytes(weights)} of weights", device))
    long = "train" in module.foreseen and guess(spec, module, model, device) >= LONG
    if not long and 8 * weights < device.memory:
        return
    try:
        found = plan(spec, find("here", spec.settings.trainer.accelerator))
    except (NotImplementedError, RuntimeError, UsageError):
        return
    if found.least > device.memory and not found.verdict.startswith("fits"):
        held = max(found.told.phases, key=lambda phase: sum(phase.held.get(part, 0) for part in LEAST))
        parts = ", ".join(f"{gigabytes(held.held[part])} of {part}" for part in LEAST if part in held.held)
        raise UsageError(too_large(spec, parts, device))
    if (found.wall or 0) > LONG and spec.settings.trainer.progress:
        print(f"plan: {found.line()}", file=sys.stderr, flush=True)


def too_large(spec: RunSpec, what: str, device: Device) -> str:
    """Why a run is refused."""
    dtype = ", or model.dtype=bfloat16" if spec.model.get("dtype") == "float32" else ""
    fix = f"take a smaller model{dtype}; stage=plan stage.device=NAME says what holds it"
    return f"model={spec.model['name']}: {what} do not fit into {gigabytes(device.memory)} of {device.name}; {fix}"


def guess(spec: RunSpec, module: DataModule, model: nn.Module, device: Device) -> float:
    """Seconds of a run by its sizes alone."""
    text = isinstance(module, TokenModule)
    size = 0 if text else module.image_size or model.recombine_source["image_size"]
    tokens = module.max_length if text else (size // PATCH) ** 2 + 1
    samples = module.foreseen["train"] * spec.settings.trainer.epochs
    weights = sum(p.numel() for p in model.parameters())
    return 6 * weights * tokens * samples / GUESSED[device.gpu]


def gigabytes(count: float) -> str:
    """4.31 GB, 812 MB"""
    return f"{count / GB:.3g} GB" if count >= 0.9995 * GB else f"{count / 1e6:.0f} MB"
