"""What a value of the configuration may be: kinds with their ranges, and one line for a value that is none of them.

A schema is a settings class (a dataclass), or the keyword arguments of a function or a class. Its annotations are
kinds: ``lr: Rate | None = None``. pydantic checks values against them strictly: true is no number, 3.0 no whole number,
an infinity nothing at all. A class with a method ``contradiction(key)`` also says which of its values do not go
together.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from inspect import Parameter, signature
from typing import Any, TypeVar, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from recombine.errors import UsageError, did_you_mean
from recombine.runtime.kinds import alternatives, bare, shown, words

T = TypeVar("T")


def typed(cls: type[T], values: Any, key: str) -> T:
    """A settings class from the values of a node.

    Args:
        key: of the node, for example "stage.distil".

    Raises:
        UsageError: as `checked` does, or the values contradict each other.
    """
    settings = cls(**checked(cls, values, key))
    if reason := getattr(settings, "contradiction", lambda key: None)(key):
        raise UsageError(reason)
    return settings


def checked(target: Callable, values: Any, key: str) -> dict[str, Any]:
    """The values of a node, each of the kind that the target's annotation names; lists are tuples where it says so.

    Args:
        target: a dataclass, or a function or class with keyword arguments. Where it takes ``**kwargs``, keys that it
            does not name pass, as long as they hold nothing but finite plain values.
        key: of the node, for example "optim"; empty for the whole configuration.

    Raises:
        UsageError: the node is no group of keys; it has a key that the target does not take; or a value is of another
            kind or out of its range.
    """
    values = {name: plain(value) for name, value in group(values, key).items()}
    for name, value in values.items():
        refuse_infinite(value, dotted(key, name))
    hints = annotations(target)
    given = {name: built(value, hints.get(name), dotted(key, name)) for name, value in values.items()}
    try:
        model = pydantic_model(target).model_validate(given)
    except ValidationError as error:
        raise UsageError(line(error.errors()[0], values, hints, key)) from None
    return {name: getattr(model, name) for name in values}


def group(node: Any, key: str) -> Mapping[str, Any]:
    """The node, which has to be a group of keys.

    Raises:
        UsageError: it is one value.
    """
    if not isinstance(node, Mapping):
        raise UsageError(f"{key}={shown(node)}: must be a group of keys, not one value; say {key}.<key>=<value>")
    return node


@cache
def pydantic_model(target: Callable) -> type[BaseModel]:
    """The pydantic model of a settings class, or of the keyword arguments of a function or class."""
    extra = "allow" if open_ended(target) else "forbid"
    config = ConfigDict(
        strict=True, extra=extra, allow_inf_nan=False, arbitrary_types_allowed=True, protected_namespaces=()
    )
    known = {name: (hint, defaults(target)[name]) for name, hint in annotations(target).items()}
    return create_model(target.__name__, __config__=config, **known)


@cache
def annotations(target: Callable) -> dict[str, Any]:
    """Name -> annotation of what a target takes; of a class also what its bases take, as long as it passes
    ``**kwargs`` on."""
    if is_dataclass(target):
        hints = get_type_hints(target, include_extras=True)
        return {field.name: hints[field.name] for field in fields(target) if field.init}
    found: dict[str, Any] = {}
    for function in constructors(target):
        hints = get_type_hints(function, include_extras=True)
        found = {p.name: hints.get(p.name, Any) for p in keywords(function)} | found
    return found


@cache
def defaults(target: Callable) -> dict[str, Any]:
    """Name -> default of what a target takes; ``...`` where it has to be given."""
    if is_dataclass(target):
        return {
            field.name: ... if field.default is MISSING and field.default_factory is MISSING else None
            for field in fields(target)
            if field.init
        }
    found: dict[str, Any] = {}
    for function in constructors(target):
        found = {p.name: ... if p.default is Parameter.empty else None for p in keywords(function)} | found
    return found


def constructors(target: Callable) -> list[Callable]:
    """The functions whose keyword arguments a target takes: its own, and those of its bases while it passes on."""
    if not isinstance(target, type):
        return [target]
    found = []
    for base in target.__mro__:
        if "__init__" in vars(base):
            found.append(base.__init__)
            if not passes_on(base.__init__):
                break
    return found


def keywords(function: Callable) -> list[Parameter]:
    """The parameters of a function that have a name."""
    kinds = (Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return [p for p in signature(function).parameters.values() if p.kind in kinds and p.name != "self"]


def passes_on(function: Callable) -> bool:
    """Whether a function takes keyword arguments that it does not name."""
    return any(p.kind is Parameter.VAR_KEYWORD for p in signature(function).parameters.values())


def open_ended(target: Callable) -> bool:
    """Whether keys that a target does not name pass."""
    return not isinstance(target, type) and passes_on(target)


def plain(value: Any) -> Any:
    """The value without OmegaConf's or other classes of sequences and groups around it."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, Sequence) else value


def built(value: Any, hint: Any, key: str) -> Any:
    """The value as pydantic's strict mode takes it: a list as a tuple and a group as a settings class, where due."""
    kinds = [bare(kind) for kind in alternatives(hint)]
    if isinstance(value, list) and any(get_origin(kind) is tuple for kind in kinds):
        return tuple(value)
    inner = next((kind for kind in kinds if is_dataclass(kind)), None)
    return typed(inner, value, key) if inner is not None and isinstance(value, Mapping) else value


def refuse_infinite(value: Any, key: str) -> None:
    """Refuses nan, infinities and whole numbers that no 64 bits hold, however deep they stand in a value."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            refuse_infinite(part, f"{key}.{name}")
    elif isinstance(value, list):
        for part in value:
            refuse_infinite(part, key)
    elif isinstance(value, float) and not math.isfinite(value) or isinstance(value, int) and abs(value) >= 2**63:
        raise UsageError(f"{key}={shown(value)}: must be a finite number that 64 bits hold")


def line(error: Mapping, values: Mapping[str, Any], hints: Mapping[str, Any], key: str) -> str:
    """One of pydantic's errors as a line of the project."""
    name = error["loc"][0]
    typed_as = dotted(key, name)
    if error["type"] == "missing" and name not in values:
        return f"{typed_as}: needs a value: say {typed_as}=..."
    if name not in hints:
        return unknown(name, values[name], list(hints), key)
    value, hint = values[name], hints[name]
    return f"{typed_as}={shown(value)}: must be {words(hint, value)}{as_list(typed_as, value, hint)}"


def as_list(key: str, value: Any, hint: Any) -> str:
    """How to write one value where a list is due."""
    due = any(get_origin(bare(kind)) in (tuple, list) for kind in alternatives(hint))
    return f"; say {key}=[{value}]" if due and isinstance(value, str) else ""


def unknown(name: str, value: Any, known: list[str], key: str) -> str:
    """The line for a key that nothing reads."""
    hint = did_you_mean(str(name), known)
    has = f"{key} has" if key else "there are"
    return f"{dotted(key, name)}={shown(value)}: there is no such key; {hint}{has} {', '.join(known)}"


def dotted(key: str, name: str) -> str:
    """The key of a value in a node, as typed."""
    return f"{key}.{name}" if key else name
