"""result.json: written once, atomically, at the end of a run; read by the report and by anyone."""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from recombine.errors import UsageError
from recombine.export import replacing

PACKAGES = ("recombine", "torch", "lightning", "hydra-core", "timm", "peft", "transformers", "torchmetrics", "numpy")


def reserve(folder: Path) -> None:
    """Makes the folder of a run and refuses one that cannot be written, before hours are spent."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (probe := folder / ".writable").touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror}); choose another hydra.run.dir") from error


def write(path: Path, result: dict) -> Path:
    """Writes a result, whole or not at all."""
    text = json.dumps(result, indent=1, default=str, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text)
    return path


def read(path: Path) -> dict:
    """Reads a result.json."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"{path}: not a readable result.json ({error})") from error


def environment() -> dict:
    """Versions, machine and commit, so that a number can be traced."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": found,
        "commit": commit(),
    }


def commit() -> str | None:
    """The checkout's commit, with + where it has uncommitted changes; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        git = ["git", "-C", str(folder)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if dirty else "")


def table(rows: list[tuple[str, str]]) -> str:
    """A two-column table for the terminal."""
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"  {label:<{width}}  {value}" for label, value in rows)
