"""Files of a data set: out of a repository of the Hugging Face hub, or out of a folder of the user's."""

from __future__ import annotations

from pathlib import Path

from recombine.errors import UsageError


def download(repository: str, revision: str, patterns: list[str]) -> Path:
    """The folder of a snapshot, named after its commit, with the files that the patterns name.

    Without network: what the hub's own cache has of that revision.

    Raises:
        UsageError: neither the hub nor its cache gives them.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        commit, local = HfApi().dataset_info(repository, revision=revision, timeout=20).sha, False
    except Exception as error:  # its network library's exceptions change with its version
        commit, local, why = revision, True, error
    try:
        folder = snapshot_download(
            repository, repo_type="dataset", revision=commit, allow_patterns=patterns, local_files_only=local
        )
    except Exception as error:
        raise UsageError(" ".join(str(why if local else error).split())) from error
    return Path(folder)


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
