"""Data modules. ``build("offline", task="emoji")`` and ``build("folder", root=...)`` return a LightningDataModule."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING

from recombine.errors import UsageError

if TYPE_CHECKING:
    from recombine.data.vision import VisionData

MODULES = {"offline": "Offline", "folder": "Folder"}  # imported on demand: Lightning and Pillow are slow to load


def build(name: str, **kwargs) -> VisionData:
    if name not in MODULES:
        close = get_close_matches(str(name), MODULES, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UsageError(f"unknown data {name!r}: {hint}choose from {', '.join(MODULES)}")
    return getattr(import_module(f"recombine.data.{name}"), MODULES[name])(**kwargs)
