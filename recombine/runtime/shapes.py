"""Whether JSON that somebody else may have written has the shape that its reader expects."""

import types
from collections.abc import Collection
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints, is_typeddict

hints_of = cache(get_type_hints)


def first_wrong(value: Any, kind: Any, required: Collection[str] = (), path: str = "it") -> str | None:
    """What is wrong with a value, as words: "val is no group of keys"; None: nothing is.

    Args:
        kind: a TypedDict, list, dict, union or plain type. Keys that it does not name may be there.
        required: the only keys that must be there, at whatever depth: older versions lacked some.
        path: what the value is called.
    """
    if type(value) in plain(kind):
        return None
    if is_typeddict(kind):
        if not isinstance(value, dict):
            return f"{path} is no group of keys"
        hints = hints_of(kind)
        due = [key for key in required if key in hints and key not in kind.__optional_keys__]
        lacking = [f"{key} is missing" for key in due if key not in value]
        place = "" if path == "it" else f"{path}."
        inner = (first_wrong(value[k], hints[k], required, place + k) for k in hints if k in value)
        return next(iter(lacking), None) or next(filter(None, inner), None)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is types.UnionType:
        tried = [first_wrong(value, one, required, path) for one in inner]
        return None if None in tried else tried[0]
    if origin in (dict, list) and isinstance(value, origin):
        if set(map(type, value.values() if origin is dict else value)) <= plain(inner[-1]):
            return None
        pairs = value.items() if origin is dict else enumerate(value)
        return next(filter(None, (first_wrong(one, inner[-1], required, f"{path}.{key}") for key, one in pairs)), None)
    kinds = (int, float) if kind is float else (origin or kind,)
    fits = isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))
    return None if fits else f"{path} is no {getattr(origin or kind, '__name__', kind)}"


@cache
def plain(kind: Any) -> frozenset[type]:
    """The types whose every value fits, found without a look into it: of float these are int and float."""
    if get_origin(kind) is types.UnionType:
        return frozenset().union(*map(plain, get_args(kind)))
    return frozenset({float: (int, float)}.get(kind, [kind] if kind in (int, str, bool, types.NoneType) else []))
