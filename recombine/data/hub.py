"""Files of a data set: out of a repository of the Hugging Face hub, or out of a folder of the user's."""

from __future__ import annotations

from pathlib import Path

from recombine.errors import UsageError
from recombine.runtime import hub


def commit(repository: str, revision: str) -> str:
    """The commit that a branch of a data set is at, or was at when the hub was last asked.

    Raises:
        UsageError: the reason why it is not known.
    """
    return hub.commit(repository, revision, "dataset")


def download(repository: str, revision: str, patterns: list[str]) -> Path:
    """The folder of a snapshot, named after its commit, with the files that the patterns name.

    Raises:
        UsageError: the reason why neither the hub's cache nor the hub gives them.
    """
    return hub.snapshot(repository, revision, hub.named(*patterns), "dataset")


def local_or_hub(
    name: str, root: str | Path | None, repository: str, revision: str, patterns: list[str], ways: str
) -> Path:
    """The user's folder ``root``, or a snapshot of the hub's where it is None.

    Raises:
        UsageError: there is neither; ``ways`` says what to do.
    """
    if root is not None:
        if not (folder := Path(root).expanduser()).is_dir():
            raise UsageError(f"data.root={root} is no folder: {ways}")
        return folder
    try:
        return download(repository, revision, patterns)
    except UsageError as error:
        raise UsageError(f"{name}: {repository} is not cached and the hub fails ({error}): {ways}") from error
