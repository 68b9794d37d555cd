"""Lets torchvision be imported beside a torch that its C extension was not built for (a CPU-only torch, mostly).

``import torchvision`` registers shape functions for two of its C++ operators; without the extension those operators do
not exist and the import dies with ``operator torchvision::nms does not exist``, and timm's and transformers' with it.
Declaring the two schemas is enough: nothing here runs them, and calling one still gives torchvision's own error.
"""

import sys
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder
from importlib.util import find_spec

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a Library undoes its declarations when it is collected


def guard() -> bool:
    """Declares the operators where needed, once; True if they are declared here. Call it before timm is imported."""
    if _declared or "torchvision" in sys.modules:
        return bool(_declared)
    spec = find_spec("torchvision")  # finds the package, imports nothing
    if spec is None or extension_loads(spec.submodule_search_locations[0]):
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            library.define(schema)
    _declared.append(library)
    return True


def extension_loads(folder: str) -> bool:
    """Loads ``_C`` as torchvision's own import does; a second load of the same file is free."""
    extension = FileFinder(folder, (ExtensionFileLoader, EXTENSION_SUFFIXES)).find_spec("_C")
    if extension is None:
        return False
    try:
        torch.ops.load_library(extension.origin)
    except (ImportError, OSError):
        return False
    return True
