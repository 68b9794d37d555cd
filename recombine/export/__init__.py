"""A recombined model as a folder that others load: `recombine.export(model, folder, "hf")`.

The module itself can be called, since `recombine.export` is the function and `python -m recombine.export` the command.
"""

import sys
from types import ModuleType

from recombine.core import tied
from recombine.export.folder import FORMATS, export, save_pretrained
from recombine.export.lora import to_lora

__all__ = ["FORMATS", "export", "save_pretrained", "to_lora"]


class Callable(ModuleType):
    """This module: calling it is calling `export`."""

    def __call__(self, *args, **options):
        return export(*args, **options)


sys.modules[__name__].__class__ = Callable
tied.leaving.append(save_pretrained)  # what a recombined model's save_pretrained does from now on
