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

    Raises:
        UsageError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be written ({error.strerror}); free some space or choose another folder"
        ) from error
    except SafetensorError as error:
        raise UsageError(f"{path}: cannot be written ({error}); free some space or choose another folder") from error
    finally:
        temporary.unlink(missing_ok=True)
