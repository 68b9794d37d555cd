"""Classes by their dotted paths: the package's own, and a user's, whose module lies in the working directory."""

import os
import sys
from importlib import import_module

from recombine.errors import UsageError


def load_class(path: str, base: type, key: str) -> type:
    """The class of that path, `my_module.MyMethod`. Its module lies in the working directory, or is installed.

    Args:
        base: a class that it must derive from.
        key: of the configuration, which an error names.

    Raises:
        UsageError: the module cannot be imported, or has no such class.
    """
    file, _, name = str(path).rpartition(".")
    if not file:
        raise UsageError(f"{key}={path}: is no path of a class: give module.Class")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: it hides nothing
    try:
        cls = getattr(import_module(file), name, None)
    except Exception as error:  # whatever the module raises while it is imported
        reason = (str(error).splitlines() or [""])[0]
        why = f"importing {file} in {os.getcwd()} fails ({type(error).__name__}: {reason})"
        raise UsageError(f"{key}={path}: {why}: correct it") from error
    if not (isinstance(cls, type) and issubclass(cls, base)):
        what = "has no" if cls is None else "has another kind of"
        raise UsageError(f"{key}={path}: {file} {what} {name}: name a subclass of {base.__module__}.{base.__name__}")
    return cls
