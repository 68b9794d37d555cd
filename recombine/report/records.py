"""Slim records: what tables and plots need of each result.json, so that the evidence of a whole grid is one small file.

A record is a result without its configuration, of which a hash is kept, and without its checkpoint and its layers'
names: `layers` is {role: {field: [one value a layer, in model order]}}. Records are committed as
experiments/<name>/runs.jsonl, one line a run; the key `cell` is the run's folder. The config.json beside it holds what
every run of the grid was configured with. It tells results of an older version of the experiment from those of today's.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from recombine import results
from recombine.errors import UsageError
from recombine.result_schema import Result
from recombine.runner.grid import CONF, Experiment
from recombine.runner.override_lines import key_of
from recombine.runtime.naming import aside
from recombine.runtime.shapes import first_wrong

EVIDENCE = CONF.parent / "experiments"
RUNS = "runs.jsonl"
CONFIG = "config.json"
SLIM = ("config", "layers", "weight_error")  # what a record has in another form than a result
LEFT_OUT = ("config", "layers", "checkpoint", "pictures", "sha256", "weight_error")


@dataclass(frozen=True)
class Record:
    """One run: where it stands in the grid, and its result."""

    labels: dict[str, str]  # axis -> label
    result: dict[str, Any]  # as it was read: whole or slim
    cell: str

    @cached_property
    def data(self) -> dict[str, Any]:
        """The slim result."""
        return self.result if "cell" in self.result else slim(self.result, self.cell)

    def get(self, path: str) -> Any:
        """What lies at a dotted path of the slim result; None if nothing does. {metric} is the run's own metric.
        Examples: `linear_probe.test`, `test.{metric}`, `layers.q.rank`."""
        value: Any = self.data if path.startswith(LEFT_OUT) else self.result  # few tables need the slim one
        for part in path.replace("{metric}", self.result.get("metric") or "").split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value


@dataclass(frozen=True)
class Runs:
    """The runs of an experiment: the records that exist, of the cells that there are."""

    records: list[Record]
    cells: list[dict[str, str]]  # the labels of every cell, run or not
    failed: dict[str, str]  # folder of a run that failed -> why
    unread: dict[str, str] = field(default_factory=dict)  # folder of a run whose result is none -> why
    other: dict[str, str] = field(
        default_factory=dict
    )  # folder of a result left out -> what was configured differently


def read(experiment: Experiment) -> Runs:
    """Each cell's result: from its folder, or else from the committed runs.jsonl. A result is left out if the
    experiment as it is today would have configured it differently, or if it cannot be read.

    Raises:
        UsageError: a committed file is not readable.
    """
    kept = {record["cell"]: record for record in lines(EVIDENCE / experiment.name / RUNS)}
    then, (now, free) = committed_config(EVIDENCE / experiment.name / CONFIG), common(experiment)
    records, failed, unread, other = [], {}, {}, {}
    for cell in experiment.cells:
        name = cell.folder
        folder = experiment.folder / name
        try:
            result, config = result_of(folder / "result.json")
        except FileNotFoundError:
            result, config = kept.get(name), then
            if (reason := folder / "failed.txt").is_file():
                failed[name] = reason.read_text(errors="replace").strip()
        except UsageError as error:
            result, unread[name] = None, str(error)
        if result is None:
            continue
        differ = [found for found in results.different(config, now) if not under(found[0], free)]
        if not experiment.composed:  # a group that it chooses may set what its own files leave out
            differ = [found for found in differ if found[0] in now]
        if differ:
            other[name] = "{}={} there, {} here".format(*differ[0])
        else:
            records.append(Record(cell.labels, result, name))
    return Runs(records, [cell.labels for cell in experiment.cells], failed, unread, other)


def result_of(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(result, its configuration as flat keys) of a run's folder.

    Raises:
        FileNotFoundError: there is none.
        UsageError: the file is no result.
    """
    try:
        result = json.loads(path.read_text())
        if (what := first_wrong(result, Result, ("role", "shape"))) is None:
            by_role(result.get("layers", ()))
            return result, results.canonical(result.get("config", {}))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        what = str(error)
    raise UsageError(f"{path}: not a readable result ({' '.join(what.split())[:200]}); move it away")


def common(experiment: Experiment) -> tuple[dict[str, Any], set[str]]:
    """(What the experiment itself configures, as flat keys; the keys that are no part of that).

    Those are the keys that the cells set, those that follow from others, and those that change no number.
    """
    own = own_settings(experiment)
    cells = {key_of(line).rpartition("@")[2] for cell in experiment.cells for line in cell.overrides}
    follow = {key for key, value in own.items() if isinstance(value, str) and "${" in value}
    free = {"experiment", *results.ELSEWHERE, *cells, *follow}
    return {key: value for key, value in own.items() if not under(key, free)}, free


def own_settings(experiment: Experiment) -> dict[str, Any]:
    """The configuration of an experiment as flat keys, unresolved."""
    config = OmegaConf.to_container(experiment.config, resolve=False)
    return results.canonical({key: value for key, value in config.items() if key != "hydra" and not aside(key)})


def under(key: str, groups: set[str]) -> bool:
    """Whether a key is one of these or lies in one."""
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def committed_config(path: Path) -> dict[str, Any]:
    """A committed config.json; empty where there is none."""
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise ValueError("no group of keys")
        return config
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not readable JSON ({error}); restore it from the repository") from error


def lines(path: Path) -> list[dict]:
    """The records of a runs.jsonl; none where there is no such file."""
    try:
        found = [json.loads(line) for line in path.read_text().splitlines() if line]
        for record in found:
            whole = {k: v for k, v in record.items() if k not in SLIM} if isinstance(record, dict) else record
            if (what := first_wrong(whole, Result)) or not isinstance(record.get("cell"), str):
                raise ValueError(what or "cell is missing")
        return found
    except FileNotFoundError:
        return []
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not a readable line of JSON ({error}); restore it from the repository") from error


def dump(records: Iterable[Record]) -> str:
    """The text of a runs.jsonl, in the order of the cells' names, so that a new run changes one line."""
    slims = sorted((record.data for record in records), key=lambda data: data["cell"])
    return "".join(results.dumps(data, ensure_ascii=False, separators=(",", ":")) + "\n" for data in slims)


def slim(result: Mapping[str, Any], cell: str) -> dict[str, Any]:
    """A result.json as a record's data."""
    kept = {"cell": cell} | {key: rounded(value) for key, value in result.items() if key not in LEFT_OUT}
    if errors := {layer: error for layer, error in (result.get("weight_error") or {}).items() if error is not None}:
        kept["weight_error"] = rounded({"mean": sum(errors.values()) / len(errors), "worst": max(errors.values())})
    if hashes := kept.get("data", {}).get("sha256"):
        kept["data"]["sha256"] = {split: digest[:12] for split, digest in hashes.items()}
    text = json.dumps(result.get("config"), sort_keys=True)
    return kept | {
        "layers": by_role(result.get("layers", ())),
        "config": hashlib.sha256(text.encode()).hexdigest()[:12],
    }


def by_role(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list]]:
    """The layers as columns: {"q": {"m": [384, ...], "n": [...], "rank": [...], "held": [...]}}; null where a
    layer lacks the field."""
    roles: dict[str, list[dict]] = {}
    for row in rows:
        numbers = {key: rounded(value) for key, value in row.items() if isinstance(value, int | float)}
        roles.setdefault(row["role"], []).append({"m": row["shape"][0], "n": row["shape"][1]} | numbers)
    return {
        role: {key: [row.get(key) for row in same] for key in dict.fromkeys(key for row in same for key in row)}
        for role, same in roles.items()
    }


def rounded(value: Any) -> Any:
    """The same with seven digits, which is more than a table shows and keeps the file at a third of its size."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, Mapping):
        return {key: rounded(v) for key, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list | tuple) else value


def provenance(records: Sequence[Record]) -> str | None:
    """One line where the records are of several commits, package versions or machines; None where they are of one."""
    mixed = []
    commits = Counter((record.get("environment.commit") or "unknown")[:7] + dirty(record) for record in records)
    if len(commits) > 1:
        mixed.append(f"{len(commits)} commits ({counted(commits)})")
    packages = dict.fromkeys(name for record in records for name in record.get("environment.versions") or ())
    for name in packages:
        versions = Counter(str((record.get("environment.versions") or {}).get(name)) for record in records)
        if len(versions) > 1:
            mixed.append(f"{len(versions)} versions of {name} ({counted(versions)})")
    devices = Counter(str(record.get("environment.device")) for record in records)
    if len(devices) > 1:
        mixed.append(f"{len(devices)} machines ({counted(devices)})")
    return f"Warning: these results come from {'; '.join(mixed)}." if mixed else None


def dirty(record: Record) -> str:
    """A plus sign where the run's checkout had uncommitted changes."""
    return "+" if (record.get("environment.commit") or "").endswith("+") else ""


def counted(names: Counter) -> str:
    """The four most common names, with how often they occur."""
    most = ", ".join(f"{name}: {n}" for name, n in names.most_common(4))
    return most + (", ..." if len(names) > 4 else "")
