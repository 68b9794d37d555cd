"""Layers as people name them: the end of a module name ("attn.qkv"), a glob, a regular expression, or all-linear.

This is what peft's `target_modules` takes. A name is meant where it is the whole name or its end after a dot; any other
text is a regular expression that matches the whole name, or else a glob. Heads are left out.
"""

import difflib
import re
from fnmatch import fnmatchcase

ALL = "all-linear"


def names(word: str, module: str) -> bool:
    """Whether the word means the module of that name."""
    if module == word or module.endswith(f".{word}"):
        return True
    try:
        if re.fullmatch(word, module):
            return True
    except re.error:
        pass  # no regular expression: a glob
    return fnmatchcase(module, word)


def nearest(word: str, modules: list[str], blocks: str) -> list[str]:
    """Up to three ends of module names that are written nearly so."""
    ends: dict[str, None] = {}
    for module in modules:
        inner = in_block(module, blocks)
        ends |= dict.fromkeys((inner, inner.rpartition(".")[2]))
    return difflib.get_close_matches(word, ends, n=3, cutoff=0.5)


def in_block(module: str, blocks: str) -> str:
    """A module's name inside its block; the whole name of one outside the blocks."""
    return re.sub(rf"^(?:{blocks})\.", "", module)
