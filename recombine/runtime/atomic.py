"""Files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from recombine.errors import UsageError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, which takes its place when the block ends well and vanishes when it does not.

    Whoever may read new files of this user may read it: it gets the permissions of the umask, which safetensors, for
    one, does not give.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch()
        permissions = temporary.stat().st_mode
        yield temporary
        if temporary.stat().st_mode != permissions:
            temporary.chmod(permissions)
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be written ({error.strerror}); free some space or choose another folder"
        ) from error
    except SafetensorError as error:
        raise UsageError(f"{path}: cannot be written ({error}); free some space or choose another folder") from error
    finally:
        temporary.unlink(missing_ok=True)
