"""The YAML files of conf/, read without Hydra: one choice of a group with the files that it builds on."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader

from recombine.errors import UsageError

CONF = Path(__file__).parents[2] / "conf"  # beside the package in a clone; no part of a wheel


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Values as OmegaConf reads them, 1e-3 as a number, by libyaml where PyYAML has it."""


Loader.yaml_implicit_resolvers = get_yaml_loader().yaml_implicit_resolvers


def need_clone(what: str) -> None:
    """Refuses what needs the files of conf/ where the package is not in a clone.

    Args:
        what: the key as typed, for example "experiment=start".

    Raises:
        UsageError: there is no conf/.
    """
    if not (CONF / "config.yaml").is_file():
        raise UsageError(f"{what}: reads conf/, which no wheel brings; clone the project and `pip install -e .` there")


def parts(group: str, name: str) -> list[Path]:
    """The files of a choice in the order in which they merge: what its defaults list names, then its own, or where the
    list says `_self_`.

    Args:
        group: a folder of conf/, for example "data" or "hydra/launcher".
        name: a file of it without .yaml, for example "vtab". There need not be one: then the list is empty.
    """
    path = CONF / group / f"{name}.yaml"
    if not path.is_file():
        return []
    files: list[Path] = []
    for entry in [e for e in read(path).get("defaults", []) if isinstance(e, str)]:
        if entry == "_self_":
            files.append(path)
            continue
        where, _, base = f"{group}/{entry}".rpartition("/") if entry[0] != "/" else entry[1:].rpartition("/")
        files += parts(where, base)
    return files if path in files else [*files, path]


def read(path: Path) -> dict[str, Any]:
    """A YAML file as it stands; read again only once it has changed. The caller does not change it."""
    return _read(path, path.stat().st_mtime_ns)


@cache
def _read(path: Path, changed: int) -> dict[str, Any]:
    return yaml.load(path.read_text(encoding="utf-8"), Loader) or {}


def load(group: str, name: str) -> dict | None:
    """A choice as plain values; None: there is no such file.

    >>> load("data", "offline")["batch_size"]
    32
    """
    found = merged(group, name)
    return None if found is None else OmegaConf.to_container(found)


def merged(group: str, name: str) -> DictConfig | None:
    """A choice as OmegaConf has it, interpolations and all; None: there is no such file."""
    if not (files := parts(group, name)):
        return None
    found: dict[str, Any] = {}
    for path in files:
        lay_over(found, read(path))
    found.pop("defaults", None)
    return OmegaConf.create(found)


def lay_over(under: dict[str, Any], over: dict[str, Any]) -> None:
    """Merges a dict into another as OmegaConf does, in a fraction of its time: lists are replaced."""
    for key, value in over.items():
        if isinstance(value, dict):
            if not isinstance(under.get(key), dict):
                under[key] = {}
            lay_over(under[key], value)
        elif value != "???" or key not in under:
            under[key] = value
