"""The file itself: safetensors that carry a sha256 of all their bytes, written in one pass and read by a memory map.

The checksum stands in the header, among the file's own metadata, so that any copy of the file carries it. It is the
sha256 of the whole file with zeros in the checksum's own place. Files of before have none and load all the same.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from recombine.errors import UsageError
from recombine.runtime.atomic import atomic_write
from recombine.runtime.digest import file_digest

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ZEROS = "0" * 64  # the checksum's place while it is computed
MARK = b'{"__metadata__":{"sha256":"'  # how a header with a checksum begins
PIECE = 2**24  # bytes that are hashed at once
LONGEST = 10**8  # bytes of a header, as in safetensors itself
DAMAGED = "use another checkpoint"


def path_of(given: object, what: str) -> Path:
    """The path that a caller gave of a file or folder.

    Raises:
        UsageError: what was given is no path.
    """
    if not isinstance(given, str | Path):
        shown = f"a {type(given).__name__}" if hasattr(given, "forward") else repr(given)  # a model's repr is long
        raise UsageError(f"{shown}: must be the path of {what}")
    return Path(given)


def write(path: Path, tensors: Mapping[str, Tensor], meta: dict) -> None:
    """Writes tensors and metadata atomically, tensor by tensor. No second copy of them is held in memory.

    Raises:
        UsageError: the file cannot be written, or the metadata holds a number that is not finite.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise UsageError(
                f"{path}: not written, {name} is {tensor.dtype}; convert the model with .to(torch.float32)"
            )
    try:
        text = json.dumps(meta | {"checksum": "sha256"}, allow_nan=False)
    except ValueError as error:
        raise UsageError(f"{path}: not written, a weight or field of the model is not finite; mend it first") from error
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # each one lies aligned
    header: dict = {"__metadata__": {"sha256": ZEROS, "recombine": text}}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    begin = len(head).to_bytes(8, "little") + head
    digest = hashlib.sha256(begin)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(begin)
        for name in order:
            for piece in pieces(tensors[name]):
                digest.update(piece)
                file.write(piece)
        file.seek(begin.index(ZEROS.encode()))
        file.write(digest.hexdigest().encode())


def pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, in order."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    for start in range(0, len(flat), PIECE):
        yield memoryview(flat[start : start + PIECE])


def read(path: Path, verify: bool = True) -> tuple[object, dict[str, Tensor]]:
    """(metadata as it stands there, tensors by name) of a file. The tensors are a memory map of it.

    Args:
        verify: read the file once before, and compare it with its checksum and with the result.json beside it.

    Raises:
        UsageError: there is no such file, or it is damaged.
    """
    if not path.is_file():
        raise UsageError(f"checkpoint={path}: no such file; result.json names the checkpoint of a run")
    try:
        if verify:
            check(path)
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("recombine", "null")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        meta = json.loads(text, parse_constant=refuse_constant)
        if verify and isinstance(meta, dict) and "checksum" in meta and not carries_checksum(path):
            raise ValueError("its checksum is gone")
        return meta, tensors
    except UsageError:
        raise
    except (SafetensorError, OSError, ValueError, RecursionError, MemoryError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise UsageError(f"{path}: truncated or corrupted ({reason}); {DAMAGED}") from error


def refuse_constant(word: str) -> None:
    """Refuses the NaN and Infinity that Python reads in JSON.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{word} in its metadata")


def check(path: Path) -> None:
    """Compares a file with the sha256 that the result.json beside it records of it, or else with its own checksum.

    Raises:
        UsageError: they differ.
    """
    recorded = recorded_digest(path)
    if recorded is not None:
        if file_digest(path) != recorded:
            why = "its sha256 is not the one in the result.json beside it"
            raise UsageError(f"{path}: damaged or replaced since its run ({why}); run again, or move result.json away")
        return
    with path.open("rb") as file:
        begin = file.read(8)
        begin += file.read(min(int.from_bytes(begin, "little"), LONGEST))
        own = own_digest(begin)
        if own is None:
            return
        digest = hashlib.sha256(begin[: 8 + len(MARK)] + ZEROS.encode() + begin[8 + len(MARK) + len(ZEROS) :])
        while piece := file.read(PIECE):
            digest.update(piece)
    if digest.hexdigest().encode() != own:
        raise UsageError(f"{path}: truncated or corrupted (its bytes do not give its checksum); {DAMAGED}")


def carries_checksum(path: Path) -> bool:
    """Whether the header begins with a checksum."""
    with path.open("rb") as file:
        return own_digest(file.read(8 + len(MARK))) is not None


def own_digest(begin: bytes) -> bytes | None:
    """The checksum in a header; None: it has none."""
    return begin[8 + len(MARK) :][: len(ZEROS)] if begin[8:].startswith(MARK) else None


def recorded_digest(path: Path) -> str | None:
    """What the result.json beside a file records as its sha256; None: there is none, or it says nothing of it."""
    try:
        result = json.loads((path.parent / "result.json").read_text())
        return result["sha256"][path.name]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
