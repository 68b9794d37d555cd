"""result.json: written once, atomically, at the end of a run; read by the report and by anyone.

Its keys are declared in result_schema.py.
"""

import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from recombine.errors import UsageError
from recombine.result_schema import MethodPart, Result
from recombine.runtime import budget_words, open_fields
from recombine.runtime.atomic import atomic_write
from recombine.runtime.inputs import changed_file
from recombine.runtime.later import LATER, added
from recombine.runtime.naming import aside
from recombine.runtime.progress import wrapped
from recombine.runtime.shapes import first_wrong

LOCK = ".running"
WORD = re.compile(r'"(?:[^"\\]|\\.)*"|NaN|-?Infinity')  # a string of JSON, or what Python writes for no finite number
VALID = {"NaN": "null", "Infinity": "1e999", "-Infinity": "-1e999"}
ELSEWHERE = {  # on what a run runs, not what it computes
    "calibration.memory",
    "export",
    "data.num_workers",
    "trainer.accelerator",
    "trainer.checkpoint_minutes",
    "trainer.compile",
    "trainer.devices",
    "trainer.gradient_checkpointing",
    "trainer.num_nodes",
    "trainer.progress",
    "trainer.strategy",
}
SHOWN = ("account", "command", "config", "data", "metric", "seconds", "seed", "stage", "test", "val")  # in every result


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Makes the folder of a run, and keeps other processes out of it until the block ends.

    Raises:
        UsageError: the folder cannot be written, or another process works there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UsageError(
            f"{folder}: another process runs here; wait for it, or choose another hydra.run.dir"
        ) from error
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror}); choose another hydra.run.dir") from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: filelock takes no lock of a file that is gone
        lock.release()


def running(folder: Path) -> bool:
    """Whether a process works in the folder of a run."""
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False


def load_finished(folder: Path, config: dict, typed: Sequence[str]) -> Result | None:
    """The result that the folder of a run holds already, or None.

    Args:
        config: of the run, as `settings` gives it.
        typed: its overrides.

    Raises:
        UsageError: it is a result of another configuration, or of a file of weights that has other bytes now.
    """
    if not (path := folder / "result.json").is_file():
        return None
    before = read(path, SHOWN)
    config = json.loads(dumps(config))
    what = config_difference(before["config"], config)
    one_sided = flat(before["config"]).keys() ^ flat(config).keys()
    if what or (what := added(one_sided, [*shlex.split(before["command"]), *typed])):
        raise UsageError(f"{path} is the result of another configuration ({what}): move it, or name another folder")
    if (what := changed_file(before)) is not None:
        raise UsageError(f"{path}: {what} has changed since: move the result, or name another folder")
    return before


def config_difference(there: dict, here: dict) -> str | None:
    """The first key by which two configurations would compute different things, with both values; None: there is none.

    A key that only one of them has came or went with a version, so it does not count, unless LATER has what it was
    before. It does where the other one has a plain value above it: then a whole group was chosen in one of them only.
    """
    there, here = (canonical({"compressor": None} | config) for config in (there, here))
    for key, before, now in different(there, here):
        if key not in ELSEWHERE:
            return f"{key}={before} there, {now} here"
    for whole, parts in ((there, here), (here, there)):
        for key in whole.keys() - parts.keys():
            if below := [part for part in parts if part.startswith(f"{key}.")]:
                group, field = f"{key}={whole[key]}", f"{below[0]}={parts[below[0]]}"
                return f"{group} there, {field} here" if whole is there else f"{field} there, {group} here"
    return None


def missing_exports(asked: str | Sequence[str] | None, result: Result) -> list[str]:
    """The formats of `export` whose folders a finished run has not written."""
    asked = [asked] if isinstance(asked, str) else asked or ()
    return [name for name in asked if name not in result.get("exports", {})]


def checkpoint_file(folder: Path, result: Mapping[str, Any]) -> Path | None:
    """The file of the model that a run in this folder scored; None: it is in none.

    stage=evaluate and sample name a file elsewhere. The bits that they are asked for are of the model in memory alone.
    """
    config = result.get("config") or {}
    bits = [(config.get(group) or {}).get("bits") for group in ("stage", "quantize")]
    if not result.get("checkpoint") or (result.get("stage") in ("evaluate", "sample") and any(bits)):
        return None
    named = Path(result["checkpoint"])
    return next(filter(Path.is_file, (folder / named.name, named)), None)


def different(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, value there, value here) of two canonical configurations, of the keys that both have or LATER knows."""
    for key in there.keys() & here.keys() | LATER.keys() & (there.keys() ^ here.keys()):
        values = [config.get(key, LATER.get(key)) for config in (there, here)]
        if values[0] != values[1]:
            yield key, *values


def settings(cfg: DictConfig) -> dict:
    """The configuration of a run, without the experiment around it."""
    kept = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra" and not aside(key)])
    kept._set_parent(cfg)  # interpolations may refer to what is left out
    return OmegaConf.to_container(kept, resolve=True)


def flat(nested: dict, prefix: str = "") -> dict:
    """A nested dict as one with dotted keys: {"a": {"b": 1}} -> {"a.b": 1}"""
    leaves = {}
    for key, value in nested.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return leaves


def canonical(config: dict) -> dict:
    """A configuration as flat keys, by which runs of all versions compare and find their state.

    The budget's word stands as `budget.kind` and `budget.value`, as it once did. A key of LATER is left out while it
    has the value that every run before it had.
    """
    keys = flat(config)
    if "budget" in keys:
        kind, value = budget_words.parse(keys.pop("budget"))
        keys |= {"budget.kind": kind, "budget.value": value}
        keys |= open_fields.decided(keys, kind in budget_words.STORED)
    return {key: value for key, value in keys.items() if key not in LATER or LATER[key] != value}


def score(result: Result) -> float:
    """The validation score that chose the epoch; nan where there is none."""
    value = result["val"].get(result["metric"])
    return float("nan") if value is None else value


def merge_parts(**who: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a result as one: merge_parts(runner={...}, adapt={...}).

    Raises:
        AssertionError: two parts write the same key. One of them has to leave it to the other.
    """
    merged, writer = {}, {}
    for name, part in who.items():
        for key, value in part.items():
            if key in merged:
                raise AssertionError(f"result.json: {key} is written by {writer[key]} and by {name}")
            merged[key], writer[key] = value, name
    return merged


def method_part(name: str, fields: Mapping[str, Any], label: str, compresses: bool) -> MethodPart:
    """What a result says of a method: its class, what the user called it, and its fields."""
    return merge_parts(recombine={"name": name, "label": label, "compresses": compresses}, **{name: fields})


def write(path: Path, result: Mapping[str, Any]) -> Path:
    """Writes a result, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(dumps(result, indent=1))
    return path


def dumps(value: Any, **options: Any) -> str:
    """Results as JSON, which knows no word for an infinity or for nan.

    An infinity is the number 1e999 or -1e999, which Python and JavaScript read back as an infinity. nan is null.

    Args:
        options: further arguments of `json.dumps`.

    >>> dumps({"ppl": float("inf"), "acc": float("nan"), "note": "NaN"})
    '{"ppl": 1e999, "acc": null, "note": "NaN"}'
    """
    return WORD.sub(lambda word: VALID.get(word[0], word[0]), json.dumps(value, default=str, **options))


def read(path: Path, required: Sequence[str] = ("config", "val", "metric")) -> Result:
    """Reads a result.json.

    Args:
        required: keys that it must have.

    Raises:
        UsageError: it cannot be read, or is no result of a run.
    """
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not a readable result.json ({error}); move it away") from error
    if (what := first_wrong(result, Result, required)) is not None:
        raise UsageError(f"{path}: no result.json of a run ({what}); move it away")
    return result


def table(rows: list[tuple[str, str]]) -> str:
    """A two-column table for the terminal: (label, value) of every row."""
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"  {label:<{width}}  {wrapped(str(value), width + 4, sys.stdout)}" for label, value in rows)
