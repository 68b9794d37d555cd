"""The one exception that users see, and how all errors that a user can mend become one line."""

import re
import shlex
from collections.abc import Iterable, Iterator
from difflib import get_close_matches

from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException


class UsageError(ValueError):
    """Bad input. The message is one line: the key as typed, its value, the reason and the fix.

    ``run.py`` prints it and exits with 2. Every other exception keeps its trace.
    """


class AlreadyRewritten(UsageError):
    """What a method wants to rewrite, another method has rewritten."""


EXPECTED = (UsageError, HydraException, OmegaConfBaseException, OSError)  # a user can mend these
NO_CHOICE = re.compile(r"In '.*?': Could not find '(.+)/(.+?)' Available options in '\1': (.+)")
NO_KEY = re.compile(r"Could not override '(.+)'. To append to your config use \+(.+)")
THERE = re.compile(r"Could not append to config\. An item is already at '.+'\. Either remove \+ prefix: '(.+)' Or .*")
NO_MERGE = re.compile(r"Error merging override (.+)")
SWEPT = re.compile(r"Ambiguous value for argument '(.+?)=(.+)' 1\. To use it as a list.*")
# nodes that take keys which their YAML does not have
ADDED = re.compile(r"model|(method|compressor)\.options|stage\.reference|calibration\.data")
ASIDE = ("hydra", "grid", "report")  # nodes of the configuration whose keys say nothing about a run


def one_line(error: BaseException, overrides: Iterable[str] = ()) -> str:
    """What went wrong as one line without a trace; Hydra's commonest complaints in the words of the command line.

    Args:
        overrides: what was typed. Of a choice Hydra names the group alone: method, where method@compressor was typed.
    """
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}=??? needs a value: say {error.full_key}=..."
    text = " ".join(line.strip() for line in str(error).split("\nConfig search path")[0].splitlines() if line.strip())
    if not isinstance(error, EXPECTED):
        return f"{type(error).__name__}: {text}"
    if match := NO_CHOICE.fullmatch(text):
        group, choice, known = match[1], match[2], [name for name in match[3].split() if name[0] != "_"]
        hint = did_you_mean(choice, known)
        group = next((key for key in keys_of(overrides, choice) if key.partition("@")[0] == group), group)
        return f"{group}={choice}: there is no such choice; {hint}choose from {', '.join(known)}"
    if (match := NO_KEY.fullmatch(text)) and (node := getattr(error.__cause__, "parent_node", None)) is not None:
        return unknown_key(match[2], match[1], node._get_root())
    if match := THERE.fullmatch(text):
        return f"+{match[1]}: there is this key already; say {match[1]}, without +"
    if match := NO_MERGE.fullmatch(text):
        return f"{match[1]}: {str(error.__cause__).splitlines()[0]}; give it a value of its own kind"
    if match := SWEPT.fullmatch(text):
        key, value = match.groups()
        fix = f"as a sweep say -m, as a list {shlex.quote(f'{key}=[{value}]')}, as a text {as_text(key, value)}"
        return f"{key}={value}: several values; {fix}"
    return text


def as_text(key: str, value: str) -> str:
    """The word for a shell that gives a key this value as one text, whatever is in it."""
    return shlex.quote(f"{key}={QuotedString(value, Quote.double).with_quotes()}")


def keys_of(overrides: Iterable[str], value: str) -> Iterator[str]:
    """The keys that were typed with a value."""
    for override in overrides:
        key, _, given = override.partition("=")
        if value in given.split(","):
            yield key.lstrip("+")


def unknown_key(typed: str, key: str, config: DictConfig) -> str:
    """What to say of a key that a configuration lacks: the key that is nearest, and those of its node.

    Args:
        typed: the override, for example "optim.momentum=0.9".
        key: the key in it.
        config: the whole configuration.
    """
    node, where, last = config, "", key
    for last in key.split("."):
        if not isinstance(below := node.get(last) if last in node else None, DictConfig):
            break
        node, where = below, f"{where}{last}."
    one_value = f"{typed}: there is no such key; {{}} is one value and has no keys of its own"
    if last in node and where + last != key:
        return one_value.format(where + last)
    if where == f"{key}.":  # its value holds keys that it lacks
        return f"{typed}: has a key that {key} lacks; say +{key}.KEY=VALUE for each, and {key}.KEY=VALUE of the others"
    if key.startswith("compressor.") and config.get("compressor") is None:
        return f"{typed}: there is no compressor; say method@compressor=NAME too, for example method@compressor=svd"
    if not (known := [str(name) for name in node if not str(name).startswith("_")]):
        return one_value.format(where[:-1])
    there = [name for name in every_key(config) if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = [where + name for name in get_close_matches(last, known, 1)] or there[:3]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    listed = f"{where[:-1] or 'the configuration'} has {', '.join(known)}"
    added = f"; a key of its class is added with +{typed.lstrip('+')}" if ADDED.fullmatch(where[:-1]) else ""
    return f"{typed}: there is no such key; {hint}{listed}{added}"


def every_key(config: DictConfig, where: str = "") -> Iterator[str]:
    """The full names of the keys that say something about a run."""
    for name in config:
        full = f"{where}{name}"
        node = config._get_node(name)
        if full not in ASIDE:
            yield full
            if isinstance(node, DictConfig) and not (node._is_none() or node._is_interpolation()):
                yield from every_key(node, f"{full}.")


def did_you_mean(wrong: str, known: list[str]) -> str:
    """The known word that is closest, as a question; empty where none is close.

    >>> did_you_mean("crips", ["crisp", "lora"])
    'did you mean crisp? '
    """
    close = get_close_matches(wrong, known, 1)
    return f"did you mean {close[0]}? " if close else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 160 characters, without its full stop; its type without one."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(". ")[:160]
