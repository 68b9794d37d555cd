"""Data modules. ``build("offline", task="emoji")`` and ``build("folder", root=...)`` return a LightningDataModule."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING

from recombine.errors import UsageError

if TYPE_CHECKING:
    from recombine.data.vision import VisionData

MODULES = {  # name: file and class, imported on demand because Lightning and Pillow are slow to load
    "offline": "offline.Offline",
    "folder": "folder.Folder",
    "vtab": "vtab.Vtab",
    "fgvc": "suites.Fgvc",
    "vision8": "suites.Vision8",
    "imagenet": "suites.Imagenet",
    "glue": "glue.Glue",
    "sentences": "sentences.Sentences",
    "text": "language.Text",
    "choices": "language.Choices",
    "commonsense": "language.Commonsense",
    "gsm8k": "language.Gsm8k",
}


def build(name: str, **kwargs) -> VisionData:
    return _find(name)(**kwargs)


def suite(name: str) -> dict[str, str]:
    """What ``data.task=all`` runs: task -> group, in order; empty where there is no suite."""
    return getattr(_find(name), "suite", {})


def _find(name: str) -> type[VisionData]:
    if name not in MODULES:
        close = get_close_matches(str(name), MODULES, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UsageError(f"unknown data {name!r}: {hint}choose from {', '.join(MODULES)}")
    file, cls = MODULES[name].split(".")
    return getattr(import_module(f"recombine.data.{file}"), cls)
