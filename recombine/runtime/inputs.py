"""The files of weights that a run started from: whether they are still what they were."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recombine.runtime.digest import remembered_digest


def changed_file(result: Mapping[str, Any]) -> str | None:
    """The file of weights that a finished run read and that has other bytes by now, as "key=file"; None: there is none.

    One that is gone has not changed.
    """
    for key, file, digest in read_files(result):
        if file.is_file() and remembered_digest(file) != digest:
            return f"{key}={file}"
    return None


def read_files(result: Mapping[str, Any]) -> Iterator[tuple[str, Path, str]]:
    """(key, file, sha256) of the files of weights that a run was told to read, as it found them."""
    if base := result.get("base"):
        yield "base", Path(base["path"]), base["sha256"]
    named = (result["config"].get("stage") or {}).get("checkpoint")
    if named is not None and (digest := result.get("sha256", {}).get(Path(named).name)):
        yield "stage.checkpoint", Path(named).expanduser(), digest
    if (named := (result["config"].get("model") or {}).get("checkpoint")) is not None:
        path = Path(named).expanduser()
        for name, digest in result.get("weights", {}).get("sha256", {}).items():
            yield "model.checkpoint", path / name if path.is_dir() else path, digest
