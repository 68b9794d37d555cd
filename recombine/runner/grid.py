"""An experiment's grid: from the YAML's axes to the command line of every cell.

    grid:
      method:                                # an axis of labelled cells: label -> overrides
        LoRA: {method: lora, method.rank: 16}
        CERSA: {method: cersa, data.task=dtd: {optim.lr: 1e-4}}  # with overrides for some labels of another axis
      data.task: [cifar100, dtd]             # an axis that is a list: the axis is the key, the labels are the values
      seed: [0, 1, 2]

The grid is the product of its axes; the last axis is the slowest, so that a broken sweep has whole tables of the first
seeds. Nothing here imports torch: the report reads thousands of cells.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, ListConfig, OmegaConf

from recombine.errors import UsageError
from recombine.runner.override_lines import key_of, quoted, values
from recombine.runtime import conf
from recombine.runtime.conf import CONF, need_clone
from recombine.runtime.naming import aside, run_folder, sweep_folder


@dataclass(frozen=True)
class Cell:
    """One run of a grid. labels: axis -> label, as tables show it; overrides: as on the command line."""

    labels: dict[str, str]
    overrides: tuple[str, ...]

    @property
    def folder(self) -> str:
        """The name of the run's folder, made of its overrides."""
        return run_folder(self.overrides)


@dataclass(frozen=True)
class Experiment:
    """A composed conf/experiment/<name>.yaml: its grid's cells and what its report shows."""

    name: str
    config: DictConfig
    overrides: tuple[str, ...] = ()  # further ones, which every cell gets
    composed: bool = True  # the config has what it chooses of other groups too; else its own files alone

    @cached_property
    def grid(self) -> dict[str, Any]:
        """The axes as plain values, as `cells` takes them."""
        return plain_axes(self.config)

    @cached_property
    def report(self) -> dict[str, Any]:
        """What `python -m recombine.report` shows, as plain values."""
        return OmegaConf.to_container(self.config.report, resolve=True) if self.config.report else {}

    @property
    def folder(self) -> Path:
        """The folder of the experiment's runs."""
        return Path(sweep_folder(self.name, ""))

    @cached_property
    def cells(self) -> list[Cell]:
        """Every run of the grid."""
        return cells(self.grid, self.overrides, self.config.only)


def load(name: str, overrides: Sequence[str] = ()) -> Experiment:
    """Composes an experiment without running it.

    Raises:
        UsageError: there is no such experiment.
    """
    need_clone(f"experiment={name}")
    if not (CONF / "experiment" / f"{name}.yaml").is_file():
        known = sorted(str(p.relative_to(CONF / "experiment"))[:-5] for p in CONF.glob("experiment/**/*.yaml"))
        raise UsageError(f"experiment={name}: there is none in conf/experiment; choose from {', '.join(known)}")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        plain = [line for line in overrides if len(values(line)) == 1]
        return Experiment(name, compose("config", [f"experiment={name}", *plain]), tuple(overrides))


def read(name: str) -> Experiment:
    """An experiment's own part of its configuration: its axes, its report and the keys that its files set, read without
    Hydra, which takes a tenth of a second. What its files choose of other groups is not there.

    Raises:
        UsageError: there is no such experiment.
    """
    if (own := conf.merged("experiment", name)) is None:
        raise UsageError(f"experiment={name}: there is none in conf/experiment")
    for key in ("grid", "report", "only"):
        own.setdefault(key, None)
    return Experiment(name, own, composed=False)


def jobs(config: DictConfig, arguments: Sequence[str]) -> list[list[str]]:
    """The command line of every run that a call of run.py asks for."""
    experiment = [line for line in arguments if line.startswith("experiment=")]
    if any(len(values(line)) > 1 for line in experiment):
        raise UsageError(f"{experiment[0]}: a sweep takes one experiment; call run.py once for each")
    shown = [line for line in arguments if line.startswith(("logger", "trainer.progress"))]  # no cell's, but each run's
    axes = plain_axes(config)
    if not axes and config.only is not None:
        raise UsageError(f"only={config.only}: chooses cells of a grid, and there is none; say experiment=NAME too")
    return [[*experiment, *shown, *cell.overrides] for cell in cells(axes, arguments, config.only)]


def plain_axes(config: DictConfig) -> dict[str, Any]:
    """The axes of a configuration's grid as plain values; none where it is null."""
    if not isinstance(config.grid, DictConfig | None):
        raise UsageError(f"grid={config.grid}: must be axes, or null; say -m KEY=1,2 for a sweep, or experiment=NAME")
    return OmegaConf.to_container(config.grid, resolve=True) if config.grid else {}


def cells(grid: Mapping[str, Any], overrides: Iterable[str] = (), only: Sequence[str] | None = None) -> list[Cell]:
    """Every cell of a grid.

    Args:
        overrides: further ones for every cell, each a value or a sweep (``seed=0,1``). One that names the key of an
            axis takes the place of that axis.
        only: keeps the cells that carry one of these labels on every axis where any of them is a label.

    Raises:
        UsageError: an axis is empty or malformed, `only` names no label, or two cells have the same overrides.
    """
    typed = [line for line in overrides if not aside(line.split("=")[0])]
    given = {key_of(line): line for line in typed}
    axes: dict[str, dict[str, list[str]]] = {}
    for axis, found in grid.items():
        axes[axis] = points(axis, found)
    special = exceptions(grid, axes)
    if cell := written_out(grid, axes, special, typed):
        axes = {axis: {label: axes[axis][label]} for axis, label in cell.labels.items()}
        given = {key: line for key, line in given.items() if line not in cell.overrides}
    for axis, found in grid.items():
        if axis in given and isinstance(found, list):
            axes[axis] = {line.split("=", 1)[1]: [line] for line in values(given.pop(axis))}
    for key, line in given.items():
        for axis, labels in axes.items():
            own = [lines for where, lines in special if axis in where]
            if any(key_of(o) == key for lines in (*labels.values(), *own) for o in lines):
                raise UsageError(f"{line}: the labels of grid.{axis} set {key}; choose some of them with only=[...]")
        axes[key] = {choice.partition("=")[2] or choice: [choice] for choice in values(line)}  # ~key has no value
    runs = product(choose(axes, only), special)
    if len({cell.folder for cell in runs}) < len(runs):
        twice = next(cell for i, cell in enumerate(runs) if cell.folder in {c.folder for c in runs[:i]})
        raise UsageError(f"grid: two cells are {' '.join(twice.overrides)}; their overrides must differ")
    return runs


def product(axes: Mapping[str, Mapping], special: Sequence[tuple[dict, list]]) -> list[Cell]:
    """The cells of these axes, the last axis the slowest."""
    every = itertools.product(*[[(axis, name) for name in axes[axis]] for axis in reversed(axes)])
    return [
        Cell(labels, overriding([line for axis, name in labels.items() for line in axes[axis][name]], labels, special))
        for labels in (dict(reversed(combination)) for combination in every)
    ]


def written_out(
    grid: Mapping[str, Any], axes: Mapping[str, Mapping], special: Sequence[tuple[dict, list]], typed: Sequence[str]
) -> Cell | None:
    """The cell whose overrides are all typed, as the `command` of its result has them.

    None: there is none, or what is typed sets no key of a label with overrides, so it narrows plain axes.
    """
    labelled = {
        key_of(line) for axis, found in grid.items() if isinstance(found, Mapping) for line in lines_of(axes[axis])
    }
    if labelled.isdisjoint(map(key_of, typed)):
        return None
    found = [cell for cell in product(axes, special) if set(typed).issuperset(cell.overrides)]
    return max(found, key=lambda cell: len(cell.overrides), default=None)


def lines_of(labels: Mapping[str, Sequence[str]]) -> list[str]:
    """All overrides of an axis."""
    return [line for lines in labels.values() for line in lines]


def choose(axes: dict[str, dict], only: Sequence[str] | None) -> dict[str, dict]:
    """The axes cut down to the labels in `only`, where an axis has any of them."""
    if only is None:
        return axes
    wanted = [str(label) for label in (only if isinstance(only, list | tuple | ListConfig) else [only])]
    if not wanted:
        raise UsageError("only=[]: chooses nothing, so nothing would run; name labels of the grid, or leave it out")
    for name in wanted:
        if not any(name in axis for axis in axes.values()):
            known = ", ".join(label for axis in axes.values() for label in axis)
            raise UsageError(f"only={name}: no axis of the grid has this label; they are {known}")
    return {
        name: {k: v for k, v in axis.items() if k in wanted} if set(axis) & set(wanted) else axis
        for name, axis in axes.items()
    }


def exceptions(grid: Mapping[str, Any], axes: Mapping[str, Mapping]) -> list[tuple[dict[str, str], list[str]]]:
    """The overrides that a label has for some labels of another axis: the two labels by axis, and the lines.

    Raises UsageError where one names an axis or a label that is not there.
    """
    found = []
    for axis, labels in grid.items():
        for name, keys in labels.items() if isinstance(labels, Mapping) else ():
            for key, sets in keys.items():
                if "=" in key:
                    other, _, label = key.partition("=")
                    if other == axis or label not in axes.get(other, ()) or not isinstance(sets, Mapping):
                        raise UsageError(
                            f"grid.{axis}.{name}: {key}: {sets}: must be AXIS=LABEL of another axis of the grid, with "
                            "overrides as in data.task=dtd: {optim.lr: 0.1}"
                        )
                    found.append(({axis: str(name), other: label}, [f"{k}={quoted(v)}" for k, v in sets.items()]))
    return found


def overriding(
    lines: Sequence[str], labels: Mapping[str, str], special: Sequence[tuple[dict, list]]
) -> tuple[str, ...]:
    """A cell's lines, with those of the exceptions that hold for its labels in place of the others of the same key."""
    for where, theirs in special:
        if where.items() <= labels.items():
            lines = [line for line in lines if key_of(line) not in set(map(key_of, theirs))] + theirs
    return tuple(lines)


def points(axis: str, found: Any) -> dict[str, list[str]]:
    """The labels of one axis with their overrides."""
    if isinstance(found, list) and found:
        return {quoted(value).strip("'"): [f"{axis}={quoted(value)}"] for value in found}
    if isinstance(found, Mapping) and found and all(isinstance(v, Mapping) for v in found.values()):
        return {
            str(name): [f"{key}={quoted(v)}" for key, v in keys.items() if "=" not in key]
            for name, keys in found.items()
        }
    raise UsageError(
        f"grid.{axis}={found}: must be a list of values, or labels with overrides as in LoRA: {{method: lora}}"
    )
