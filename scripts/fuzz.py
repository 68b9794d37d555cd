"""Tries random configurations, good and bad ones, and looks at what comes of each.

    python scripts/fuzz.py                      200 configurations, seed 0
    python scripts/fuzz.py --runs 2000 --seed 7 --jobs 2
    python scripts/fuzz.py --replay 17          configuration 17 of that seed again, with its output

Every key of every node is drawn from its schema (recombine/runtime/schema.py), so that a new key is tried as soon as it
is there. What is drawn is a small run with one to three changes: values in range and at its ends, values out of range
or of another kind, misspelt keys, other choices of the groups, budgets, and combinations of these.

A configuration has to end in one of two ways: in one line on stderr with exit code 2, or in a result of finite numbers.
A value out of its range must not be accepted. Runs are forked from one process that has imported everything.
"""

import argparse
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from hydra.core.override_parser.overrides_parser import OverridesParser
from pydantic import TypeAdapter, ValidationError

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from recombine import data as data_sets
from recombine import models  # noqa: E402
from recombine.core.method import Method  # noqa: E402
from recombine.runner import config  # noqa: E402
from recombine.runtime import conf  # noqa: E402
from recombine.runtime.kinds import alternatives, bare  # noqa: E402
from recombine.runtime.schema import annotations, dotted  # noqa: E402
from recombine.runtime.user_code import load_class  # noqa: E402

CPU_SECONDS = 20  # that a small run may take
WALL_SECONDS = 300  # after which it is taken to wait for something
SMALL = ["trainer.epochs=1", "data.limit=16", "calibration.samples=8", "calibration.batch_size=4", "probe=false"]
SMALL += ["harness.limit=4"]
PAIRS = (  # models and data that belong together
    ("tiny_vit", ("offline",)),
    ("tiny_swin", ("offline",)),
    ("tiny_bert", ("sentences",)),
    ("tiny_llama", ("text", "choices")),
)
STRANGE = ("null", "true", "abc", "'日本語'", "[]", "[a,b]", "{a:1}", "-1", "0", "2.5", "1e30", "nan", "inf", "-inf")
STRANGE += ("''", str(10**30), str(-(10**12)), "'a b'", "[1,null]", "1e-300")
BUDGETS = ("none", "retained_50", "retained_90", "trainable_2k", "energy_90", "memory_5mb")
BAD_BUDGETS = ("retained_0", "retained_500", "half", "energy_-1", "5", "null", "trainable_", "memory_0mb")
LONG = {"epochs", "rounds", "steps", "episodes", "alternations"}  # a large value is a long run, as it was asked for


@dataclass
class Case:
    """A command line. bad: overrides that no run may accept."""

    arguments: list[str]
    bad: list[str] = field(default_factory=list)


def targets(model: str, data: str, method: str, stage: str) -> dict[str, Any]:
    """Node -> what its keys are the schema of, for these choices of the groups."""
    values = conf.load("model", model)
    cls = load_class(conf.load("method", method)["_target_"], Method, "method._target_")
    return config.NODES | {
        "model": models.schema(values["name"], values.get("library", "timm"), values["arch"]),
        "data": data_sets.find(data),
        "method": cls,
        "stage": config.stage_schema(stage),
    }


def keys(target: Any, node: str, given: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(dotted key, annotation) of a node's keys that its YAML has; of nested settings theirs."""
    for name, hint in annotations(target).items():
        inner = next((part for part in alternatives(hint) if hasattr(part, "__dataclass_fields__")), None)
        if inner is not None and isinstance(given.get(name), dict):
            yield from keys(inner, dotted(node, name), given[name])
        elif name in given:
            yield dotted(node, name), hint


def bounds(hint: Any) -> tuple[type, float, float, bool]:
    """(int or float, least, most, whether the ends are out) of a numeric kind."""
    marks = [m for mark in get_args(hint)[1:] for m in getattr(mark, "metadata", [mark])]
    low = next((m.ge for m in marks if isinstance(m, Ge)), next((m.gt for m in marks if isinstance(m, Gt)), -math.inf))
    high = next((m.le for m in marks if isinstance(m, Le)), next((m.lt for m in marks if isinstance(m, Lt)), math.inf))
    return bare(hint), low, high, any(isinstance(m, Gt) for m in marks)


def good(hint: Any, rng: random.Random) -> str | None:
    """A value in the range of a kind, a small one; None: none can be drawn from the kind alone."""
    kind = rng.choice(alternatives(hint))
    if kind is type(None):
        return "null"
    if get_origin(bare(kind)) is Literal:
        return str(rng.choice(get_args(bare(kind))))
    if bare(kind) is bool:
        return rng.choice(("true", "false"))
    if bare(kind) in (int, float):
        number, low, high, open_end = bounds(kind)
        low = 0 if low == -math.inf else low
        if number is int:
            return str(int(min(high, low + rng.choice((0, 1, 2, 4)) + open_end)))
        return f"{min(high, low + rng.choice((0.001, 0.01, 0.1, 0.5)) * min(1.0, high - low)):g}"
    if get_origin(bare(kind)) is tuple and bare(get_args(bare(kind))[0]) is float:
        return "[0.5,0.5,0.5]"
    return None


def ends(hint: Any) -> list[str]:
    """Values at the upper end of a kind's numbers and just beyond its ends."""
    found = []
    for kind in alternatives(hint):
        if bare(kind) in (int, float):
            number, low, high, _ = bounds(kind)
            found += [str(number(end)) for end in (high, high + 1 if number is int else high * 2) if end < math.inf]
            found += [str(number(low) - 1)] if low > -math.inf else []
    return found


def fits(hint: Any, text: str) -> bool:
    """Whether a value, as typed, is of a kind."""
    value = OverridesParser.create().parse_override(f"key={text}").value()
    value = str(value) if type(value).__name__ == "QuotedString" else value
    if isinstance(value, float) and not math.isfinite(value):
        return False
    needs_list = any(get_origin(bare(kind)) is tuple for kind in alternatives(hint))
    given = tuple(value) if needs_list and isinstance(value, list) else value
    try:
        TypeAdapter(hint).validate_python(given, strict=True)
    except (ValidationError, OverflowError):
        return False
    return True


def change(key: str, hint: Any, rng: random.Random, sound: bool) -> tuple[str, bool] | None:
    """(an override of a key, whether it is bad). sound: it is not to be; None: the kind alone gives no such value."""
    draw = 0.0 if sound else rng.random()
    value = good(hint, rng) if draw < 0.4 else rng.choice(ends(hint) or STRANGE) if draw < 0.6 else rng.choice(STRANGE)
    if value is None:
        if sound:
            return None
        value = rng.choice(STRANGE)
    if key.rpartition(".")[2] in LONG and value.isdigit() and int(value) > 10 and fits(hint, value):
        value = "2"
    return f"{key}={value}", not fits(hint, value)


def misspelt(key: str, rng: random.Random) -> str:
    """A key with two letters exchanged or one left out, with Hydra's signs before it at times."""
    at = rng.randrange(1, max(2, len(key) - 1))
    wrong = key[:at] + key[at + 1 :] if rng.random() < 0.5 else key[:at] + key[at : at + 2][::-1] + key[at + 2 :]
    return f"{rng.choice(('', '+', '++'))}{wrong if wrong != key else key + 'x'}=1"


def case(rng: random.Random) -> Case:
    """One configuration."""
    model, sources = rng.choice(PAIRS)
    known = {group: sorted(p.stem for p in (conf.CONF / group).glob("[!_]*.yaml")) for group in ("method", "stage")}
    chosen = {
        "model": model,
        "data": rng.choice(sources),
        "method": "crisp" if rng.random() < 0.3 else rng.choice(known["method"]),
        "stage": "adapt" if rng.random() < 0.5 else rng.choice(known["stage"]),
    }
    sound = rng.random() < 0.5
    found = Case([*(f"{group}={choice}" for group, choice in chosen.items()), *SMALL])
    if rng.random() < 0.5:
        word = rng.choice(BUDGETS if sound or rng.random() < 0.8 else BAD_BUDGETS)
        found.arguments.append(f"budget={word}")
        found.bad += [f"budget={word}"] if word in BAD_BUDGETS else []
    if rng.random() < 0.15:
        found.arguments.append(f"method@compressor={rng.choice(known['method'])}")
    pool = [pair for node, target in targets(**chosen).items() for pair in keys(target, node, given(node, chosen))]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        key, hint = rng.choice(pool)
        spelt_wrong = not sound and rng.random() < 0.08
        drawn = (misspelt(key, rng), True) if spelt_wrong else change(key, hint, rng, sound)
        if drawn is not None:
            put(found, *drawn)
    return found


def put(found: Case, line: str, bad: bool) -> None:
    """Adds an override in the place of an earlier one of the same key."""
    name = line.split("=")[0]
    found.arguments = [given for given in found.arguments if given.split("=")[0] != name] + [line]
    found.bad = [given for given in found.bad if given.split("=")[0] != name] + ([line] if bad else [])


def given(node: str, chosen: dict[str, str]) -> dict[str, Any]:
    """The keys of a node in its YAML. chosen: group -> choice."""
    choice = (chosen | {"optim": "adamw", "trainer": "cpu", "logger": "none"}).get(node)
    if choice is not None:
        return conf.load(node, choice)
    whole = yaml.safe_load((conf.CONF / "config.yaml").read_text())
    return whole[node] if node else {key: value for key, value in whole.items() if not isinstance(value, dict)}


def run(found: Case, folder: Path) -> tuple[int | str, str, float]:
    """Runs a configuration in a forked process. Returns (exit code or "hang", its output, CPU seconds)."""
    log = folder / "log.txt"
    if (pid := os.fork()) == 0:
        child(found, folder, log)
    end = time.monotonic() + WALL_SECONDS
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    seconds = usage.ru_utime + usage.ru_stime
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
    code = "hang" if killed else os.waitstatus_to_exitcode(status)
    return code, log.read_text(errors="replace"), seconds


def child(found: Case, folder: Path, log: Path) -> None:
    """The life of the forked process."""
    code = 99
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
        os.setsid()
        os.chdir(folder)
        file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(file, stream)
        sys.argv = ["run.py", "trainer.progress=false", f"hydra.run.dir={folder}/out", *found.arguments]
        import run as program

        code = program.cli()
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def verdict(found: Case, code: int | str, output: str, folder: Path) -> tuple[str, str]:
    """(what became of a configuration, what is wrong with that; empty: nothing)"""
    if code == "hang":
        return "hang", f"took more than {CPU_SECONDS} seconds"
    if "Traceback" in output:
        return "trace", output.strip().splitlines()[-1]
    lines = [line for line in output.splitlines() if line.startswith("run.py: ")]
    if code == 2:
        rest = [line for line in output.splitlines() if line and line not in lines and not allowed(line)]
        if len(lines) != 1:
            return "refused", f"{len(lines)} lines: {lines[:2]}"
        if rest:
            return "refused", f"other lines beside it: {rest[:2]}"
        return "refused", ""
    if code != 0:
        return "ended", f"exit code {code}: {output.strip().splitlines()[-1:]}"
    if found.bad:
        return "accepted", f"nonsense: {' '.join(found.bad)}"
    path = folder / "out" / "result.json"
    if not path.is_file():
        return "ended", "no result.json"
    if strange := not_finite(json.loads(path.read_text())):
        return "accepted", f"not finite: {strange}"
    return "ran", ""


def allowed(line: str) -> bool:
    """Whether a line may stand beside a refusal: what loads, notes, and lines of progress."""
    return line.startswith(("loading ", "note: ", "data=")) or ": " in line and line.split(": ")[0].isidentifier()


def not_finite(result: dict) -> str:
    """A score or a loss of a result that is no finite number."""
    for part in ("val", "test"):
        for key, value in (result.get(part) or {}).items():
            if isinstance(value, float) and not math.isfinite(value) or value is None:
                return f"{part}.{key}={value}"
    return ""


def main() -> int:
    """Runs the configurations and prints what became of them. Exit code 1: one of them did not end well."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", type=int, help="only this configuration, with its output")
    options = parser.parse_args()
    counts, faults = Counter(), 0
    warm()
    for number in range(options.runs) if options.replay is None else [options.replay]:
        found = case(random.Random(f"{options.seed} {number}"))
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        code, output, seconds = run(found, folder)
        what, why = verdict(found, code, output, folder)
        shutil.rmtree(folder, ignore_errors=True)
        counts[what] += 1
        if why:
            faults += 1
            print(f"{number} {what}: {why}\n    python run.py {' '.join(found.arguments)}", flush=True)
        if options.replay is not None:
            print(f"python run.py {' '.join(found.arguments)}\n{output}\n{what}, {seconds:.1f} s {why}")
    print(f"{sum(counts.values())} configurations: {dict(counts)}, {faults} not as they should be")
    return 1 if faults else 0


def warm() -> None:
    """Imports what runs import, so that each starts at once."""
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import recombine.report  # noqa: F401
    import run as program  # noqa: F401
    from recombine.runner import ranks  # noqa: F401

    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
