"""recombine: compress a pretrained transformer, adapt it, or both at once.

model = timm.create_model("vit_small_patch16_224", pretrained=True)
recombine.apply(model, recombine.Cersa(alpha=0.95))     # now train it with any loop
recombine.count(model)                                  # parameters, bytes
recombine.save(model, "cersa.safetensors")
recombine.merge(model)                                  # an ordinary timm model again
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recombine.api import *  # noqa: F403


class BeforeTorchvision:
    """Runs runtime.torchvision_guard when torchvision is first looked for: timm and transformers import it."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        """Guards torchvision and steps aside; another finder finds it."""
        if name == "torchvision":
            sys.meta_path.remove(BeforeTorchvision)
            import_module("recombine.runtime.torchvision_guard").guard()


sys.meta_path.insert(0, BeforeTorchvision)


def __getattr__(name: str):
    """What `recombine.api` offers, imported at first use: the report and `run.py --help` need no torch."""
    if name.startswith("__") and name != "__all__":
        raise AttributeError(name)
    if find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    return getattr(import_module(f"{__name__}.api"), name)


def __dir__():
    return [*globals(), *import_module(f"{__name__}.api").__all__]
