"""What `stage=plan` prints: the plan of one run, or a table of a grid's."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from recombine import data, results
from recombine.errors import EXPECTED, UsageError, first_line, one_line
from recombine.runner import grid, override_lines
from recombine.runner.config import resolve
from recombine.runner.ledger import duration
from recombine.runner.plan import Plan, gigabytes, plan
from recombine.runner.plan_devices import Device, find
from recombine.runtime import progress
from recombine.runtime.schema import typed
from recombine.stages.settings import PlanSettings

ALIKE = ("seed",)  # keys that change nothing of what a run takes
COLUMNS = ("weights", "trained", "peak", "in", "time", "verdict")
NAMED = 4  # runs that a row of the table names


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
    """The plan of a configuration; of a suite, of its first task.

    Raises:
        UsageError: the run cannot be, or not be rehearsed.
    """
    if cfg.data.task == "all":
        cfg = OmegaConf.merge(cfg, {"data": {"task": next(iter(data.suite(cfg.data.name)), "all")}})
    spec = resolve(cfg)
    try:
        return plan(spec, device)
    except UsageError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:  # what reads values, of which there are none
        why = f"{spec.method.label} cannot be rehearsed without weights ({first_line(error)})"
        raise UsageError(f"stage=plan: {why}; profile it, or plan another") from error


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


def several(loader, config: DictConfig, arguments: Sequence[str]) -> None:
    """Plans the runs of a sweep and prints a table, a row for those that take the same.

    Args:
        loader: Hydra's, of configurations.
        arguments: the command line without the program.

    Raises:
        UsageError: none of the runs can be planned, or the device is not known.
    """
    device = find(settings(config).device, config.trainer.accelerator)
    cells = grid.cells(grid.plain_axes(config), arguments, config.only)
    named: dict[tuple[str, ...], list[str]] = {}  # what a run takes -> the runs, by their labels
    plans: dict[tuple[str, ...], tuple[str, ...]] = {}
    notes: dict[str, None] = {}
    jobs = list(zip(cells, grid.jobs(config, arguments), strict=True))
    for cell, job in progress.of(jobs, "plan", "runs"):
        kept = tuple(o for o in job if override_lines.key_of(o) not in ALIKE)
        if kept not in plans:
            try:
                found = planned(loader.load_sweep_config(config, list(kept)), device)
                plans[kept], notes = row(found), notes | dict.fromkeys(found.told.notes)
            except EXPECTED as error:
                plans[kept] = ("", "", "", "", "", one_line(error))
        named.setdefault(plans[kept], []).append(called(cell, cells))
    print(table(named, device), *(f"note: {note}" for note in notes), sep="\n")
    if not any(taken[0] for taken in named):
        raise UsageError("stage=plan: none of the runs can be; the table says why")


def called(cell: grid.Cell, cells: Sequence[grid.Cell]) -> str:
    """A run by its labels on the axes on which runs differ and do not plan alike."""
    several = [axis for axis in cell.labels if len({other.labels[axis] for other in cells}) > 1 and axis not in ALIKE]
    return ", ".join(cell.labels[axis] for axis in several) or "all"


def row(found: Plan) -> tuple[str, ...]:
    """What a run takes, as the table shows it."""
    told = found.told
    time = "?" if found.wall is None else duration(found.wall)
    trained = f"{told.parameters['trained'] / 1e6:.3g}M"
    return gigabytes(told.weights), trained, gigabytes(found.peak), told.largest.name, time, found.verdict


def table(named: Mapping[tuple[str, ...], Sequence[str]], device: Device) -> str:
    """The rows as text, in columns."""
    lines = [("runs", "of", *COLUMNS)]
    for taken, runs in named.items():
        names = list(dict.fromkeys(runs))
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        lines.append((str(len(runs)), "; ".join(names[:NAMED]) + more, *taken))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([f"Plan for {device.name}, {gigabytes(device.memory)}; speed {device.how}", *text])
