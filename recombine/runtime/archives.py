"""Members of the archives that registries serve: .whl, .tar.gz, .tgz and .deb."""

from __future__ import annotations

import io
import lzma
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from recombine.errors import UsageError


def members(path: Path) -> list[str]:
    """Names of the files inside a .whl, .tgz or .deb."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            return [name for name in archive.namelist() if not name.endswith("/")]
    with _tar(path) as archive:
        return [info.name.removeprefix("./") for info in archive if not info.isdir()]


def read(path: Path, member: str) -> bytes:
    """The bytes of one member, by its name inside the archive.

    Raises:
        UsageError: the archive has no such member.
    """
    return read_many(path, [member])[member]


def read_many(path: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Several members in one pass over the archive, which matters for compressed tars."""
    names, contents = set(names), {}
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            contents = {name: archive.read(name) for name in names & set(archive.namelist())}
    else:
        with _tar(path) as archive:
            for info in archive:
                if (name := info.name.removeprefix("./")) in names and (file := archive.extractfile(info)):
                    contents[name] = file.read()
    if missing := sorted(names - set(contents)):
        raise UsageError(f"no member {missing[0]!r} in {path}: members(path) lists what there is")
    return contents


def _tar(path: Path) -> tarfile.TarFile:
    if path.suffix != ".deb":
        return tarfile.open(path)
    name, data = next((n, d) for n, d in _ar(path.read_bytes()) if n.startswith("data.tar"))
    if name.endswith(".xz"):  # whole: seeking back in a compressed stream starts it over
        data = lzma.decompress(data)
    elif name.endswith(".zst"):
        data = _zstd(data)
    return tarfile.open(fileobj=io.BytesIO(data))


def _zstd(data: bytes) -> bytes:
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        try:
            import zstandard as zstd
        except ImportError:
            raise UsageError("no reader for data.tar.zst here: pip install zstandard, or use Python 3.14") from None
    with zstd.open(io.BytesIO(data), "rb") as stream:
        return stream.read()


def _ar(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Members of an ar archive: 60-byte headers (name 16, dates and modes, size at 48:58), bodies padded to even."""
    assert data[:8] == b"!<arch>\n", "not an ar archive"
    at = 8
    while at + 60 <= len(data):
        name, size = data[at : at + 16].decode().strip().rstrip("/"), int(data[at + 48 : at + 58])
        yield name, data[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
