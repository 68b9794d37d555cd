"""The one exception that users see, and how all errors that a user can mend become one line."""

import re
from difflib import get_close_matches

from hydra.errors import HydraException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException


class UsageError(ValueError):
    """Bad input. The message is one line: the key as typed, its value, the reason and the fix.

    ``run.py`` prints it and exits with 2. Every other exception keeps its trace.
    """


EXPECTED = (UsageError, HydraException, OmegaConfBaseException, OSError)  # a user can mend these
NO_CHOICE = re.compile(r"In '.*?': Could not find '(.+)/(.+?)' Available options in '\1': (.+)")
NO_VALUE = re.compile(r"Error parsing override '(.+?)' missing EQUAL at '<EOF>'")
NO_KEY = re.compile(r"Could not override '(.+)'. To append to your config use (\+.+)")


def one_line(error: BaseException) -> str:
    """What went wrong as one line without a trace; Hydra's commonest complaints in the words of the command line."""
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}=??? needs a value: say {error.full_key}=..."
    text = " ".join(line.strip() for line in str(error).split("\nConfig search path")[0].splitlines() if line.strip())
    if not isinstance(error, EXPECTED):
        return f"{type(error).__name__}: {text}"
    if match := NO_CHOICE.fullmatch(text):
        group, choice, known = match[1], match[2], match[3].split()
        more = ", and those in folders that --help lists" if group == "experiment" else ""
        hint = did_you_mean(choice, known)
        return f"{group}={choice}: there is no such choice; {hint}choose from {', '.join(known)}{more}"
    if match := NO_KEY.fullmatch(text):
        node = getattr(error.__cause__, "parent_node", None)  # the part of the configuration that lacks the key
        known = [key for key in node or () if not key.startswith("_")]
        hint = did_you_mean(str(getattr(error.__cause__, "key", match[1])), known)
        return f"{match[1]}: there is no such key; {hint}choose from {', '.join(known)}, or add it: {match[2]}"
    if match := NO_VALUE.match(text):
        return f"{match[1]}: a key without a value: say {match[1]}=..."
    return text


def did_you_mean(wrong: str, known: list[str]) -> str:
    """The known word that is closest, as a question; empty where none is close.

    >>> did_you_mean("crips", ["crisp", "lora"])
    'did you mean crisp? '
    """
    close = get_close_matches(wrong, known, 1)
    return f"did you mean {close[0]}? " if close else ""
