"""Kinds of values that a configuration has, as annotations with their ranges, and what they are in words.

``lr: Rate | None`` is a number from 0 to 1000, or null. A string beside a kind (`Annotated[..., "a folder"]`) is what
its errors say.
"""

from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator, Field

from recombine.errors import did_you_mean
from recombine.runtime.memory import PATTERN

LARGEST = 2**31 - 1  # of whole numbers without a bound of their own

Whole = Annotated[int, Field(ge=0, le=LARGEST)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Steps = Annotated[int, Field(ge=0, le=10_000_000)]
Epochs = Annotated[int, Field(ge=1, le=100_000)]
Bits = Annotated[int, Field(ge=2, le=16)]
Group = Annotated[int, Field(ge=8, le=2**16, multiple_of=8), "a multiple of 8 from 8 to 65536"]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Pixels = Annotated[int, Field(ge=1, le=4096)]
Tokens = Annotated[int, Field(ge=8, le=2**20)]
BatchSize = Annotated[int, Field(ge=1, le=2**20)]
Workers = Annotated[int, Field(ge=0, le=4096)]
Rate = Annotated[float, Field(ge=0, le=1e3)]  # a learning rate: a number above moves weights out of all use
Weight = Annotated[float, Field(ge=0, le=1e6)]  # of a term in a sum
Positive = Annotated[float, Field(gt=0, le=1e6)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
PartialShare = Annotated[float, Field(ge=0, lt=1)]
Word = Annotated[str, BeforeValidator(lambda x: str(x) if type(x) in (int, float) else x)]  # a task may be called 80
Name = Annotated[Word, Field(min_length=1)]
Project = Annotated[Word, Field(pattern=r"^[^/\\#?%:]{1,128}$"), "1 to 128 characters without / \\ # ? % :"]
Place = Annotated[Name | Path, "the path of a folder or file"]
Bytes = Annotated[str, Field(pattern=PATTERN), "a size such as 8gb or 500mb, or auto"]
Colours = Annotated[tuple[float, float, float], "three numbers, one of each colour"]
Deviations = Annotated[tuple[Positive, Positive, Positive], "three numbers above 0, one of each colour"]

BASIC = {int: "a whole number", float: "a number", str: "a word", bool: "true or false", NoneType: "null"}


def shown(value: Any) -> str:
    """A value as a user would type it, cut where it is long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Sequence) and not isinstance(value, str):
        text = f"[{','.join(map(shown, value))}]"
    else:
        text = str(value) if not isinstance(value, int) or abs(value) < 10**60 else f"{str(value)[:20]}..."
    return text if len(text) <= 120 else f"{text[:117]}..."


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The kinds that an annotation allows: int | None -> (int, NoneType). What is beside a kind stays with it."""
    if get_origin(hint) in (Union, UnionType):
        return tuple(part for one in get_args(hint) for part in alternatives(one))
    return (hint,)


def bare(kind: Any) -> Any:
    """A kind without what stands beside it: Annotated[int, ...] -> int."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def words(hint: Any, value: Any = None) -> str:
    """What an annotation allows, in words: "a whole number from 1, or null"."""
    kinds = list(dict.fromkeys(kind_words(part, value) for part in alternatives(hint)))
    return ", or ".join(kinds) if len(kinds) < 3 else f"{', '.join(kinds[:-1])}, or {kinds[-1]}"


def kind_words(kind: Any, value: Any) -> str:
    """One kind of value in words."""
    if get_origin(kind) is Annotated:
        base, *marks = get_args(kind)
        said = next((mark for mark in marks if isinstance(mark, str)), None)
        return said or kind_words(base, value) + limits(marks, value)
    if get_origin(kind) is Literal:
        known = [shown(choice) for choice in get_args(kind)]
        return f"{'one of ' if len(known) > 1 else ''}{', '.join(known)}{hint_of(value, known)}"
    if kind in BASIC:
        return BASIC[kind]
    if get_origin(kind) in (tuple, list) or kind in (tuple, list):
        parts = [part for part in get_args(kind) if part is not ...]
        return f"a list of {plural(parts[0])}" if len(set(parts)) == 1 else "a list"
    return "a group of keys"


def hint_of(value: Any, known: list[str]) -> str:
    """The choice that is closest to a wrong one, for the end of a line."""
    close = did_you_mean(str(value), known)
    return f" ({close.strip()})" if close else ""


def plural(kind: Any) -> str:
    """Several values of a kind in words."""
    return {int: "whole numbers", float: "numbers", str: "words"}.get(bare(kind), "values")


def limits(marks: Sequence[Any], value: Any) -> str:
    """The range of a number in words."""
    parts = [part for mark in marks for part in getattr(mark, "metadata", [mark])]
    least = next((f" from {p.ge:g}" for p in parts if isinstance(p, Ge)), "")
    above = next((f" above {p.gt:g}" for p in parts if isinstance(p, Gt)), "")
    most = next((f" to {p.le}" for p in parts if isinstance(p, Le) and (p.le < LARGEST or too_large(value))), "")
    below = next((f", below {p.lt}" for p in parts if isinstance(p, Lt)), "")
    return f"{least}{above}{most}{below}".replace("to 1000.0", "to 1000").replace("to 1000000.0", "to 1e6")


def too_large(value: Any) -> bool:
    """Whether a value is a number beyond every bound that goes without saying."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > LARGEST
