"""Tensors that are pages of a file: given back to the system once they are used, and read again when they are."""

import ctypes
import tempfile
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from recombine.errors import UsageError
from recombine.runtime.tensor_file import pieces

PAGEOUT = 21  # madvise(2): MADV_PAGEOUT, Linux 5.4; what was written to stays
PAGE = 4096  # bytes, at least


def release(tensors: Iterable[Tensor]) -> None:
    """Gives the memory of tensors back to the system, where it is pages of a file.

    Elsewhere, and where the system cannot, nothing happens.
    """
    mapped = [t for t in tensors if t.device.type == "cpu" and not t.untyped_storage().resizable()]  # or others' memory
    parts = parts_of_memory() if mapped else []
    for tensor in mapped:
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
        if end - start >= PAGE and of_file(start, end, parts):
            start -= start % PAGE
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), PAGEOUT)


def parts_of_memory() -> list[str]:
    """The parts of this process's memory, a line each, by address; none where the system tells none."""
    try:
        return Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []


def of_file(start: int, end: int, parts: list[str]) -> bool:
    """Whether the addresses from start to end lie in one part of the memory that is a file's."""
    at = bisect_right(parts, start, key=lambda part: int(part[: part.index("-")], 16))
    where, _, _, _, inode, *_ = parts[at - 1].split(maxsplit=5) if at else ["-0", "", "", "", "0"]
    return inode != "0" and end <= int(where.split("-")[1], 16)


def on_disk(tensor: Tensor, folder: Path | None) -> Tensor:
    """The same values as pages of a new file, which has no name and goes with the tensor.

    Args:
        folder: in which the file lies; None: the system's folder for temporary files.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="recombine-") as file:
            for piece in pieces(tensor):
                file.write(piece)
            file.flush()
            flat = torch.from_file(file.name, shared=False, size=tensor.numel(), dtype=tensor.dtype)
    except OSError as error:
        where = folder or tempfile.gettempdir()
        raise UsageError(f"{where}: weights cannot be written ({error.strerror}); free some space there") from error
    release([flat])
    return flat.view(tensor.shape)
