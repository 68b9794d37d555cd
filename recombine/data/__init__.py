"""Data modules. ``build("offline", task="emoji")`` and ``build("folder", root=...)`` return a LightningDataModule."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING

from recombine.errors import UsageError

if TYPE_CHECKING:
    from recombine.data.vision.base import VisionData

MODULES = {  # name: file and class, imported on demand because Lightning and Pillow are slow to load
    "offline": "vision.offline.Offline",
    "folder": "vision.folder.Folder",
    "vtab": "vision.vtab.Vtab",
    "fgvc": "vision.suites.Fgvc",
    "vision8": "vision.suites.Vision8",
    "imagenet": "vision.suites.Imagenet",
    "glue": "text.glue.Glue",
    "sentences": "text.sentences.Sentences",
    "text": "language.base.Text",
    "choices": "language.base.Choices",
    "commonsense": "language.base.Commonsense",
    "gsm8k": "language.base.Gsm8k",
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
    file, _, cls = MODULES[name].rpartition(".")
    return getattr(import_module(f"recombine.data.{file}"), cls)
