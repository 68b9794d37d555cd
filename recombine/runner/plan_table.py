"""What `stage=plan` prints: the plan of one run, or a table of a grid's."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from recombine import data, results
from recombine.errors import EXPECTED, UsageError, one_line
from recombine.runner.config import resolve
from recombine.runner.ledger import duration
from recombine.runner.plan import Plan, gigabytes, plan
from recombine.runner.plan_devices import Device, find
from recombine.runtime import progress
from recombine.runtime.naming import aside
from recombine.runtime.schema import typed
from recombine.stages.settings import PlanSettings

ALIKE = ("seed",)  # keys that change nothing of what a run takes
COLUMNS = ("cells", "weights", "trained", "peak", "at", "time", "verdict")


def settings(cfg: DictConfig) -> PlanSettings:
    """The keys of `stage=plan`.

    Raises:
        UsageError: one of them has another kind of value.
    """
    return typed(PlanSettings, OmegaConf.to_container(cfg.plan, resolve=True), "stage")


def one(cfg: DictConfig, out: Path) -> float:
    """Plans a run, prints that, and writes plan.json into the run's folder.

    Raises:
        UsageError: the run cannot be, or the device is not known.
    """
    wanted = settings(cfg)
    device = find(wanted.device, cfg.trainer.accelerator)
    found = planned(cfg, device)
    path = results.write(made(out) / "plan.json", found.as_dict())
    print(shown(found, path), flush=True)
    return float("nan")


def made(out: Path) -> Path:
    """The folder, which is there from now on."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out}: cannot be written ({error.strerror}); choose another hydra.run.dir") from error
    return out


def planned(cfg: DictConfig, device: Device) -> Plan:
    """The plan of a configuration; of a suite, of its first task."""
    if cfg.data.task == "all":
        cfg = OmegaConf.merge(cfg, {"data": {"task": next(iter(data.suite(cfg.data.name)), "all")}})
    return plan(resolve(cfg), device)


def shown(found: Plan, path: Path) -> str:
    """The plan of one run for the terminal."""
    told, numbers = found.told, found.told.parameters
    rows = [("verdict", found.verdict)]
    rows += [("parameters", f"{numbers['total']:,}, of which {numbers['trained']:,} train")]
    for phase in told.phases:
        seconds = found.seconds[phase.name]
        time = "time not known" if seconds is None else duration(seconds)
        parts = ", ".join(f"{part} {gigabytes(size)}" for part, size in phase.held.items())
        rows.append((phase.name, f"{gigabytes(phase.bytes)} ({parts}); {time}"))
    rows.append(("peak", f"{gigabytes(found.peak)} in {told.largest.name}, at least {gigabytes(found.least)}"))
    rows.append(("disk", disk(found)))
    total = "not known: how many samples there are, the data say" if found.wall is None else duration(found.wall)
    hours = "" if found.wall is None or not found.device.gpu else f", {found.wall * found.ranks / 3600:.2g} GPU-hours"
    rows.append(("time", f"{total}{hours} ({found.device.how})"))
    rows += [("note", note) for note in told.notes]
    rows.append(("plan", str(path)))
    where = f"{found.device.name}, {gigabytes(found.device.memory)}"
    return f"Plan for {where}; texts count as long as they may be\n{results.table(rows)}"


def disk(found: Plan) -> str:
    """What goes to the disk, in words."""
    pictures = f", pictures {gigabytes(found.pictures)} once decoded" if found.pictures else ""
    return f"weights to fetch {gigabytes(found.downloads)} unless they are there{pictures}, the result " + gigabytes(
        found.told.changed
    )


def several(loader, config: DictConfig, jobs: Sequence[Sequence[str]]) -> None:
    """Plans the runs of a sweep and prints a table, a row for those that take the same.

    Args:
        loader: Hydra's, of configurations.
        jobs: the command line of each.

    Raises:
        UsageError: none of the runs can be planned, or the device is not known.
    """
    device = find(settings(config).device, config.trainer.accelerator)
    cells: dict[tuple[str, ...], int] = {}
    for job in jobs:
        kept = tuple(o for o in job if o.lstrip("+").partition("=")[0] not in ALIKE)
        cells[kept] = cells.get(kept, 0) + 1
    rows: dict[tuple[str, ...], list] = {}
    refused = 0
    for kept, count in progress.of(cells.items(), "plan", "runs"):
        try:
            found = planned(loader.load_sweep_config(config, list(kept)), device)
            cost = row(found)
        except EXPECTED as error:
            refused += 1
            cost = ("", "", "", "", "", one_line(error))
        entry = rows.setdefault((varied(kept, cells), *cost), [0])
        entry[0] += count
    print(table(rows, device))
    if refused == len(cells):
        raise UsageError("stage=plan: none of the runs can be; see the table")


def varied(kept: Sequence[str], cells) -> str:
    """What tells a run from the others, as typed."""
    common = set.intersection(*(set(other) for other in cells))
    own = [o for o in kept if o not in common and not aside(o.lstrip("+").partition("=")[0])]
    return " ".join(own) or "all"


def row(found: Plan) -> tuple[str, ...]:
    """The columns of a plan, without those of the cell."""
    told = found.told
    time = "?" if found.wall is None else duration(found.wall)
    trained = f"{told.parameters['trained'] / 1e6:.3g}M"
    return gigabytes(told.weights), trained, gigabytes(found.peak), told.largest.name, time, found.verdict


def table(rows: dict[tuple[str, ...], list], device: Device) -> str:
    """The rows as text, columns aligned, with the cells beneath each other at the end."""
    lines = [("runs", *COLUMNS[1:], COLUMNS[0])]
    lines += [(str(count), *cost, cell) for (cell, *cost), (count,) in rows.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([f"Plan for {device.name}, {gigabytes(device.memory)}; {device.how}", *text])
