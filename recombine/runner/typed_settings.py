"""From a node of the configuration to a settings class: unknown keys and values of the wrong kind in one line."""

from collections.abc import Mapping
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import DictConfig

from recombine.errors import UsageError

T = TypeVar("T")
KIND_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a word",
    bool: "true or false",
    list: "a list",
    tuple: "a list",
    type(None): "null",
}


def typed(cls: type[T], values: Any, key: str) -> T:
    """A settings class from the values of a node; lists become tuples.

    Raises:
        UsageError: the node is no group of keys, or it has a key that the class does not have, or a value of a kind
            that the class does not take there.
    """
    known = get_type_hints(cls)
    for name, value in group(values, key).items():
        if name not in known:
            raise UsageError(f"{key}.{name}={value}: there is no such key; {key} has {', '.join(known)}")
        if not fits(value, known[name]):
            raise UsageError(f"{key}.{name}={value}: must be {' or '.join(map(kind_word, kinds(known[name])))}")
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def group(node: Any, key: str) -> Mapping[str, Any]:
    """The node, which has to be a group of keys.

    Raises:
        UsageError: it is one value.
    """
    if not isinstance(node, Mapping | DictConfig):
        raise UsageError(f"{key}={node}: must be a group of keys, not one value; say {key}.<key>=<value>")
    return node


def kinds(hint: Any) -> tuple[type, ...]:
    """The classes that an annotation names: int | list[int] -> (int, list)."""
    parts = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return tuple(get_origin(part) or part for part in parts)


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of the annotated kind.

    A whole number is a float, but true and false are no numbers. A number passes for a word: whoever knows the words
    refuses it and lists them.
    """
    known = set(kinds(hint))
    if isinstance(value, bool):
        return bool in known
    known |= {int} if float in known else set()
    known |= {int, float} if str in known else set()
    known |= {list} if tuple in known else set()
    return isinstance(value, tuple(known))


def kind_word(kind: type) -> str:
    """A kind of value as a user would call it."""
    return KIND_WORDS.get(kind, "a group of keys")
