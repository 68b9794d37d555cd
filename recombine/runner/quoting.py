"""Names as they are typed, for Hydra's grammar.

It has no tilde, no quote inside a word, no second `=` and no letters but A to Z. Folders have all of these. So a value
that the grammar cannot read, and that is no list, dict, call, quoted text or interpolation, is quoted here, each part
between commas by itself, as commas make a sweep. Every other value is left as it is. `~` at the beginning of a value
becomes the home folder.
"""

import os
import re
from collections.abc import Iterator

from hydra.core.override_parser.overrides_parser import OverridesParser, create_functions
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from recombine.errors import UsageError, as_text, did_you_mean

STRUCTURED = re.compile(r"[\[{'\"]|.*\$\{|(\w+)\(", re.DOTALL)  # how lists, dicts, texts, interpolations, calls begin
FUNCTIONS = [*create_functions().functions]  # that Hydra's grammar calls: choice(1,2)
UNREAD = re.compile(r"(?:token recognition error at: |input )'(.+?)'", re.DOTALL)  # in a message of the grammar
NO_FUNCTION = re.compile(r"Unknown function '(\w+)'")


def parse(override: str) -> Override:
    """An override by Hydra's grammar."""
    return OverridesParser.create().parse_override(override)


def parses(override: str) -> bool:
    """Whether Hydra's grammar reads it."""
    try:
        parse(override)
    except HydraException:
        return False
    return True


def readable(override: str) -> str:
    """The override, its value quoted where Hydra's grammar could not read it.

    >>> readable("data.root=/home/anna/my pictures (1)")
    'data.root="/home/anna/my pictures (1)"'
    >>> readable("method.rank=4,8")
    'method.rank=4,8'

    Raises:
        UsageError: it cannot be read, and quoting it would not mean what was typed.
    """
    key, equals, value = override.partition("=")
    if not key or not (parses(f"{key}=1") or parses(key)):
        raise UsageError(f"{override}: a key is words with dots between them; say key=value, for example seed=1")
    if not equals:
        if not key.startswith("~"):
            raise UsageError(f"{key}: a key without a value: say {key}=...")
        return override
    try:
        parsed = parse(override)
        text = parsed._value.text if isinstance(parsed._value, QuotedString) else ""
        return f"{key}={quote(text)}" if text.startswith("~") else override
    except HydraException as error:
        parts = [*choices(value)]
        if any(is_structured(part) and not parses(f"{key}={part}") for part in parts):
            raise UsageError(unreadable(override, str(error))) from error
        return f"{key}={','.join(part if parses(f'{key}={part}') else quote(part) for part in parts)}"


def choices(value: str) -> Iterator[str]:
    """The parts between the commas of a value, but not between those inside of a list, a dict, a call or a text."""
    while True:
        ends = [end for end, sign in enumerate(value) if sign == ","] + [len(value)]
        whole = (end for end in ends if parses(f"a={value[:end]}"))
        end = next(whole, ends[-1]) if is_structured(value) else ends[0]
        yield value[:end]
        if end == len(value):
            return
        value = value[end + 1 :]


def is_structured(value: str) -> bool:
    """Whether a value begins like more than a name; `photos(1)` is a name, as there is no such function."""
    begin = STRUCTURED.match(value)
    return begin is not None and (begin[1] is None or bool(did_you_mean(begin[1], FUNCTIONS)))


def quote(text: str) -> str:
    """A text as Hydra's grammar writes it, with the home folder in the place of `~`."""
    return QuotedString(os.path.expanduser(text), Quote.double).with_quotes()


def unreadable(override: str, complaint: str) -> str:
    """What is wrong with a value that begins like a list, a dict, a call or a text, and is none."""
    key, _, value = override.partition("=")
    fix = as_text(key, value)
    if found := NO_FUNCTION.search(complaint):
        near = did_you_mean(found[1], FUNCTIONS)
        return f"{override}: there is no function {found[1]}; {near}a text is quoted: {fix}"
    if "'<EOF>'" in complaint or "no viable alternative" in complaint:
        return f"{override}: ends where a bracket or a quote is still open; close it, or quote a text: {fix}"
    where = f" at {found[1].strip()}" if (found := UNREAD.search(complaint)) else ""
    return f"{override}: cannot be read{where}; quote each text in it, or all of it: {fix}"
