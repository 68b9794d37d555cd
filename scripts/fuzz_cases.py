"""Draws the configurations that scripts/fuzz.py tries, from the schemas of their keys."""

import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from hydra.core.override_parser.overrides_parser import OverridesParser
from pydantic import TypeAdapter, ValidationError

sys.path[:0] = [str(Path(__file__).parents[1])]

from recombine import data as data_sets  # noqa: E402
from recombine import models  # noqa: E402
from recombine.core.method import Method  # noqa: E402
from recombine.runner import config  # noqa: E402
from recombine.runtime import conf  # noqa: E402
from recombine.runtime.kinds import alternatives, bare  # noqa: E402
from recombine.runtime.schema import annotations, dotted  # noqa: E402
from recombine.runtime.user_code import load_class  # noqa: E402

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
    if key == "trainer.compile" and value == "true":  # minutes of a C++ compiler
        value = "eager"
    large = value == "null" or value.isdigit() and int(value) > 64
    if key in ("data.limit", "harness.limit") and large and fits(hint, value):  # all of the data: a long run too
        value = "8"
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
