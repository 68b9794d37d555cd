"""The files of weights that a run started from: whether they are still what they were."""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from recombine.runtime.tensor_file import file_digest


def changed_file(result: Mapping[str, Any]) -> str | None:
    """The checkpoint that a finished run read and that has other bytes by now, as "key=file"; None: there is none.

    One that is gone has not changed.
    """
    for key, file, digest in read_files(result):
        if file.is_file() and digest_of(file, (now := file.stat()).st_size, now.st_mtime_ns) != digest:
            return f"{key}={file}"
    return None


def read_files(result: Mapping[str, Any]) -> Iterator[tuple[str, Path, str]]:
    """(key, file, sha256) of the checkpoints that a run read, as it found them."""
    if base := result.get("base"):
        yield "base", Path(base["path"]), base["sha256"]
    named = (result["config"].get("stage") or {}).get("checkpoint")
    if named is not None and (digest := result.get("sha256", {}).get(Path(named).name)):
        yield "stage.checkpoint", Path(named).expanduser(), digest


@lru_cache
def digest_of(file: Path, size: int, modified: int) -> str:
    """The sha256 of a file, which the cells of a sweep read once. size, modified: they tell when to read it again."""
    return file_digest(file)
