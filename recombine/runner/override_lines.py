"""Overrides as Hydra's grammar writes them: method.rank=16, seed=0,1, ~data.limit. Nothing here imports torch."""

import json
import re
from collections.abc import Mapping
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from recombine.errors import UsageError

PLAIN = re.compile(r"[A-Za-z_][\w./-]*|-?\d+(\.\d+)?(e-?\d+)?")


def quoted(value: Any) -> str:
    """A value of a YAML file as Hydra's override grammar writes it."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{','.join(quoted(v) for v in value)}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{quoted(v)}" for k, v in value.items()) + "}"
    text = str(value)
    return text if PLAIN.fullmatch(text) else "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def key_of(line: str) -> str:
    """What an override sets: seed of ++seed=5, data.limit of ~data.limit."""
    return line.split("=")[0].lstrip("+~")


def values(line: str) -> list[str]:
    """Every override that one with a choice stands for: seed=0,1 -> seed=0, seed=1."""
    parsed = OverridesParser.create().parse_override(line)
    if not parsed.is_sweep_override():
        return [line]
    example = f"for example {parsed.get_key_element()}=1,2"
    if not parsed.is_discrete_sweep():
        raise UsageError(f"{line}: a grid takes lists of values, {example}")
    if not (found := [f"{parsed.get_key_element()}={value}" for value in parsed.sweep_string_iterator()]):
        raise UsageError(f"{line}: there is no value in it, so nothing would run; give some, {example}")
    return found
