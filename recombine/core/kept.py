"""What a method keeps of its layers until they are rewritten, and what replaces them: beyond a limit in files.

A file is a safetensors file with a checksum, one for each group of layers. Vectors stay in memory beside it, so whoever
reads spectra alone opens no file. A file that a killed process left is used again, if it is whole and of the same
method and weights.
"""

import hashlib
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import safe_open
from torch import Tensor, nn

from recombine.errors import UsageError
from recombine.runtime import tensor_file
from recombine.runtime.mapped import on_disk, release

log = logging.getLogger(__name__)

OWN = re.compile(r"\.lock|.*-[0-9a-f]{8}\.safetensors.*")  # names of files in a folder of factors


class Spilled(Mapping):
    """The tensors of a group that lie in a file; each is read when it is asked for, and is then a copy in memory."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]):
        self.path, self.devices = path, {name: tensor.device for name, tensor in tensors.items()}
        self.small = {name: tensor.clone() for name, tensor in tensors.items() if tensor.ndim < 2}
        self.whole = False  # it has been read since it was written, and is as it was

    def __getitem__(self, name: str) -> Tensor:
        if name in self.small:
            return self.small[name]
        device = self.devices[name]  # KeyError: there is none
        if not self.whole:
            try:
                tensor_file.read(self.path)
            except UsageError as error:
                self.path.unlink(missing_ok=True)
                fix = "start again, and its layers are computed anew"
                raise UsageError(f"{self.path}: damaged since it was written ({error}); {fix}") from error
            self.whole = True
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(name).to(device, copy=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self.devices)

    def __len__(self) -> int:
        return len(self.devices)


class Kept:
    """Tensors by group of layers, a group under the name of its first layer.

    Args:
        limit: bytes that may stay in memory; None: any number.
        folder: of the files; it goes at the end. None: a temporary one.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None):
        self.limit, self.folder, self.stamp = limit, folder, ""
        self.groups: dict[str, Mapping[str, Tensor]] = {}
        self.held = 0  # bytes in memory
        self.settled: set[int] = set()  # parameters of new layers, by identity; several layers may share one
        self.lock: FileLock | None = None
        self.temporary: tempfile.TemporaryDirectory | None = None

    def __contains__(self, name: str) -> bool:
        return name in self.groups

    def __getitem__(self, name: str) -> Mapping[str, Tensor]:
        return self.groups[name]

    def __setitem__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps a group.

        Raises:
            UsageError: it has to go to a file, and that cannot be written or another process uses the folder.
        """
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self.limit is not None and self.held + size > self.limit:
            path = self.file(name)
            tensor_file.write(path, tensors, {"name": name, "stamp": self.stamp})
            tensors, size = Spilled(path, tensors), 0
        self.groups[name] = tensors
        self.held += size

    def put(self, model: nn.Module, name: str, layer: nn.Module) -> None:
        """Puts a new layer into a model, in the place of one whose weight nobody reads again.

        The new weights stay when all else is forgotten. Beyond the limit they become pages of a file.

        Raises:
            UsageError: the disk is full.
        """
        release(model.get_submodule(name).parameters())
        for p in layer.parameters():
            size = p.numel() * p.element_size()
            if self.limit is None or p.device.type != "cpu" or id(p) in self.settled:
                continue
            self.settled.add(id(p))
            if self.held + size > self.limit:
                p.data = on_disk(p.data, self.file("").parent)
            else:
                self.held += size
        model.set_submodule(name, layer)

    def drop(self, name: str) -> None:
        """Forgets a group, if it is there."""
        tensors = self.groups.pop(name, {})
        if isinstance(tensors, Spilled):
            tensors.path.unlink(missing_ok=True)
        else:
            self.held -= sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def file(self, name: str) -> Path:
        """Where a group's file lies. The folder is made and locked at the first call.

        Raises:
            UsageError: another process uses the folder, or it cannot be made.
        """
        if self.folder is None:
            self.temporary = self.temporary or tempfile.TemporaryDirectory(prefix="recombine-")
            return Path(self.temporary.name) / f"{key(name)}.safetensors"
        if self.lock is None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lock = FileLock(self.folder / ".lock")
                self.lock.acquire(timeout=0)
                others = [p.name for p in self.folder.iterdir() if p.is_file() and not OWN.fullmatch(p.name)]
            except Timeout as error:
                why = "another process keeps its factors there; wait for it, or choose another folder"
                raise UsageError(f"{self.folder}: {why}") from error
            except OSError as error:
                why = f"cannot be written ({error.strerror}); choose another folder"
                raise UsageError(f"{self.folder}: {why}") from error
            if others:
                self.lock.release()
                self.lock = None
                why = f"holds other files, such as {min(others)}, and is removed at the end; name a folder of its own"
                raise UsageError(f"{self.folder}: {why}")
        return self.folder / f"{key(name)}.safetensors"

    def find(self, stamp: str) -> None:
        """Takes over what a killed process left in the folder; what is damaged is named and goes.

        Args:
            stamp: of the method and the weights. Files of others go.
        """
        self.stamp = stamp
        if self.folder is None or not self.folder.is_dir():
            return
        self.file("")
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                meta, tensors = tensor_file.read(path)
                if meta["stamp"] == stamp:
                    self.groups[meta["name"]] = Spilled(path, tensors)
                    continue
            except (UsageError, KeyError, TypeError) as error:
                log.warning("%s: damaged (%s), its layers are computed again", path, error)
            path.unlink()

    def close(self, done: bool) -> None:
        """Forgets all. done: the files go too; otherwise those in a given folder stay for another process."""
        self.groups.clear()
        if self.temporary is not None:
            self.temporary.cleanup()
        if self.lock is not None:
            self.lock.release()
            if done:
                shutil.rmtree(self.folder, ignore_errors=True)


def key(name: str) -> str:
    """A layer's name as that of a file, of any length."""
    return f"{name[-80:]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
