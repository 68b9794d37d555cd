"""Data sets by name: ``build("offline", task="emoji")`` -> a data module (`recombine.data.base.DataModule`).

A name is one of the package's own (``fgvc``), or the dotted path of a class that is not in it: ``my_module.MyData``.
Everything is imported on demand, since Lightning takes seconds to load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pkgutil import walk_packages
from typing import TYPE_CHECKING, Any

from recombine.errors import UsageError
from recombine.runtime.schema import annotations as keys_of
from recombine.runtime.schema import checked
from recombine.runtime.user_code import load_class

if TYPE_CHECKING:
    from recombine.data.base import DataModule


def build(name: str, **settings) -> DataModule:
    """The data module of that name; ``settings`` are the other keys of its YAML.

    Raises:
        UsageError: there is no such data set, or it takes no such setting, or refuses its value.
    """
    return find(name)(**checked(find(name), taken(find(name), settings), "data"))


def check(name: str, *, key: str = "data", **settings) -> None:
    """Refuses a setting that `build` does not take. ``key``: of the node, for the error.

    Raises:
        UsageError: as `build` does.
    """
    checked(find(name, key), taken(find(name, key), settings), key)


def taken(cls: type[DataModule], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those that the class lacks and that are null: the YAML of another data set has them."""
    return {key: value for key, value in settings.items() if value is not None or key in keys_of(cls)}


def suite(name: str) -> dict[str, str]:
    """What ``data.task=all`` runs: task -> group, in order; empty where there is no suite."""
    return find(name).suite


def say_default_task(name: str, task: str | None, overrides: Sequence[str]) -> None:
    """Says which task of a paper's suite a run takes, where the user has not chosen one.

    ``overrides`` are those of the command line.
    """
    cls = find(name)
    if cls.experiment and not any(o.lstrip("+").startswith(("data.task=", "experiment=")) for o in overrides):
        log_once = import_module(f"{__name__}.base").log_once
        log_once(
            f"data={name}: one of its {len(cls.suite)} tasks runs, {task} ({cls.task_labels.get(task, task)}); "
            f"data.task=all runs them all, experiment={cls.experiment} the paper's table"
        )


def find(name: str, key: str = "data") -> type[DataModule]:
    """The class of a data set, by its name or by its dotted path. ``key``: of the node, for the error.

    Raises:
        UsageError: there is no such class, or it is not a `DataModule`.
    """
    if "." in str(name):
        return _of_the_user(str(name))
    from recombine.data.base import require_known

    classes = known_classes()
    require_known(f"{key}.name", "data set", name, classes, ", or give the path of a class: module.Class")
    return classes[name]


@cache
def known_classes() -> dict[str, type[DataModule]]:
    """name -> class of every data set in this package: the `DataModule` classes that set ``name``."""
    from recombine.data.base import DataModule

    classes: dict[str, type[DataModule]] = {}
    for module in walk_packages(__path__, f"{__name__}."):
        for cls in vars(import_module(module.name)).values():
            mine = isinstance(cls, type) and issubclass(cls, DataModule) and cls.__module__ == module.name
            if mine and vars(cls).get("name"):
                assert cls.name not in classes, f"{cls} and {classes[cls.name]} have one name: {cls.name}"
                classes[cls.name] = cls
    return dict(sorted(classes.items()))


def _of_the_user(path: str) -> type[DataModule]:
    """A class of a module that lies in the working directory, or is installed."""
    from recombine.data.base import DataModule

    cls = load_class(path, DataModule, "data.name")
    if not cls.name:
        raise UsageError(f"data.name={path}: the class has no name of its own: write name = ... in it")
    return cls
