"""Files of the Hugging Face hub: a commit's, from the hub's own cache (HF_HUB_CACHE) where they are, else downloaded.

What is pinned to a commit and cached asks nothing. A branch costs a request, and takes the commit it had last where the
hub does not answer. What the cache must hold is told by the commit's list of files, which the client keeps beside them.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.request import getproxies

from huggingface_hub import HfApi, constants, get_cached_repo_tree, get_token, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    filter_repo_objects,
    get_session,
)

from recombine.errors import UsageError
from recombine.runtime import progress

CONNECT_SECONDS = 3  # the client itself would wait for minutes, and try several times
PINNED = re.compile(r"[0-9a-f]{40}")

Wanted = Callable[[Sequence[str]], list[str]]  # names of a repository's files -> those to take; none: it is of no use


def named(*patterns: str) -> Wanted:
    """Takes the files that the patterns name."""
    return lambda names: list(filter_repo_objects(names, allow_patterns=list(patterns)))


def commit(repository: str, revision: str | None, kind: str = "model") -> str:
    """The commit that a branch is at, or that it was at when the hub was last asked.

    Args:
        revision: a branch or a tag; None: main. A commit is returned as it is.
        kind: "model" or "dataset".

    Raises:
        UsageError: the reason, without a full stop: nobody answers and it was never asked, or there is none.
    """
    if revision and PINNED.fullmatch(revision):
        return revision
    trouble = unreachable()
    try:
        answer = HfApi().resolve_revision(
            repository, repo_type=kind, revision=revision, local_files_only=trouble is not None
        )
    except Exception as error:  # the transport's own errors, which differ between the client's versions
        raise UsageError(trouble or reason(error, repository, kind)) from error
    return answer.resolved


def snapshot(repository: str, revision: str | None, wanted: Wanted, kind: str = "model") -> Path:
    """The folder of a commit, named after it, with the wanted files.

    Args:
        revision, kind: as `commit` takes them.

    Raises:
        UsageError: the reason why neither the cache nor the hub gives them, without a full stop.
    """
    at = commit(repository, revision, kind)
    folder = Path(constants.HF_HUB_CACHE, f"{kind}s--{repository.replace('/', '--')}", "snapshots", at)
    listed = cached_sizes(repository, at, kind)
    if listed is not None and (names := wanted([*listed])) and all(is_whole(folder / n, listed[n]) for n in names):
        return folder
    if trouble := unreachable():
        there = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        if listed is None and wanted(there):
            return folder
        raise UsageError(trouble)
    try:
        return download(repository, at, wanted, kind, folder)
    except UsageError:
        raise
    except Exception as error:  # as above
        raise UsageError(reason(error, repository, kind)) from error


def cached_file(repository: str, name: str) -> Path | None:
    """A file of a model as the cache has it, without a request; None: it is not there, or not with all its bytes."""
    if not isinstance(found := try_to_load_from_cache(repository, name), str):
        return None
    path = Path(found)
    sizes = cached_sizes(repository, path.parent.name, "model") or {}
    return path if is_whole(path, sizes.get(name, path.stat().st_size)) else None


def cached_sizes(repository: str, at: str, kind: str) -> dict[str, int] | None:
    """The files of a commit and their bytes, as the cache has noted them; None: another client's cache, or none."""
    try:
        tree = get_cached_repo_tree(repository, repo_type=kind, revision=at)
    except (CachedRepoTreeNotFoundError, ValueError):  # the latter: no name of a repository
        return None
    return {file.path: file.size for file in tree if isinstance(file, RepoFile)}


def is_whole(path: Path, size: int) -> bool:
    """Whether a file is there with all its bytes: a copied cache, or a machine that lost its power, may have a part."""
    return path.is_file() and path.stat().st_size == size


def download(repository: str, at: str, wanted: Wanted, kind: str, folder: Path) -> Path:
    """Fetches what the folder of a commit lacks of the wanted files. It says how much that is."""
    tree = HfApi().list_repo_tree(repository, recursive=True, revision=at, repo_type=kind)
    sizes = {file.path: file.size for file in tree if isinstance(file, RepoFile)}
    names = wanted(list(sizes))
    if not names:
        raise UsageError(f"{repository} at {at[:8]} holds none of the files that are needed")
    lacking = {name: sizes[name] for name in names if not is_whole(folder / name, sizes[name])}
    count, amount = f"{len(lacking)} file{'s' * (len(lacking) != 1)}", in_bytes(sum(lacking.values()))
    require_room(sum(lacking.values()))
    if progress.is_shown():
        print(f"fetching {repository} at {at[:8]}: {count}, {amount}", file=sys.stderr, flush=True)
    with bars(f"fetching {repository}, {amount}"):
        fetch = partial(snapshot_download, repository, repo_type=kind, revision=at, allow_patterns=names)
        fetch()
        if cut := [folder / name for name in names if not is_whole(folder / name, sizes[name])]:
            for path in cut:  # the client links what its cache has, whatever its size
                path.resolve().unlink()
            fetch()
    return folder


def in_bytes(count: int) -> str:
    """A number of bytes in the largest unit that leaves one digit before the point: "4.7 GB"."""
    unit = max(0, min(3, (len(str(count)) - 1) // 3))
    return f"{count / 1000**unit:.{min(unit, 1)}f} {('bytes', 'kB', 'MB', 'GB')[unit]}"


def require_room(needed: int) -> None:
    """Refuses what does not fit on the disk of the hub's cache.

    Raises:
        UsageError: the reason, without a full stop.
    """
    place = Path(constants.HF_HUB_CACHE).absolute()
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    if (free := shutil.disk_usage(there).free) < needed:
        raise UsageError(full(f"{in_bytes(needed)} are needed there, {in_bytes(free)} are free"))


def full(how: str) -> str:
    """The reason for a full disk."""
    return f"the disk of {constants.HF_HUB_CACHE} is full: {how}; free some space, or set HF_HOME to another disk"


@contextmanager
def bars(what: str) -> Iterator[None]:
    """The client's own bars on a terminal; where stderr is a file, a line every half a minute."""
    if progress.is_shown() and sys.stderr.isatty():
        yield
        return
    silent = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with progress.waiting(what):
            yield
    finally:
        if not silent:
            enable_progress_bars()


def unreachable() -> str | None:
    """Why nobody answers at the hub's address, in words; None: somebody does."""
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=CONNECT_SECONDS)
    except Exception as error:  # the transport's own errors, which differ between the client's versions
        return reason(error)
    return None


def reason(error: BaseException, repository: str = "", kind: str = "model") -> str:
    """What went wrong and what to do, in one line without a full stop, and without a signed address."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__
    known = (words(one, repository, kind) for one in seen)
    first = (str(seen[0]).strip().splitlines() or [type(seen[0]).__name__])[0]
    return next(filter(None, known), None) or re.sub(r"\?\S+", "", first).rstrip(". ")[:160]


def words(error: BaseException, repository: str, kind: str) -> str | None:
    """The reason that one error is; None: it says nothing that a user could act upon."""
    page = f"{constants.ENDPOINT}/{'datasets/' * (kind == 'dataset')}{repository}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    match error:
        case GatedRepoError() if get_token():
            return f"{repository} is gated, and the account of your token has no access: ask for it at {page}"
        case GatedRepoError():
            return f"{repository} is gated: accept its terms at {page}, then `hf auth login` or set HF_TOKEN"
        case RepositoryNotFoundError():
            return f"the hub has no {kind} {repository}, or it is private: correct the name, or set HF_TOKEN"
        case RevisionNotFoundError():
            return f"{repository} has no such revision: take a commit or a branch of {page}"
        case RemoteEntryNotFoundError():
            return f"{repository} lacks a file: see {page}"
        case HfHubHTTPError() if status in (401, 403):
            return f"the hub refuses the token ({status}): set HF_TOKEN, or `hf auth login`"
        case HfHubHTTPError() if status >= 500 or status == 429:
            return f"{constants.ENDPOINT} answers {status}: try again later"
        case FileMetadataError():
            return (
                f"what answers at {constants.ENDPOINT} leaves out the hub's headers, as some proxies do: correct "
                "HTTPS_PROXY, NO_PROXY or HF_ENDPOINT"
            )
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return full(os.strerror(error.errno))
        case OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set"
        case Exception() if type(error).__module__.startswith("httpx"):  # the client's network library
            proxy = getproxies().get(constants.ENDPOINT.partition(":")[0])
            by = f" through the proxy {re.sub('//.*@', '//', proxy)}" if proxy else ""
            return f"no connection to {constants.ENDPOINT}{by}: {type(error).__name__}"
    return None
