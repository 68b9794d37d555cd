"""Adapters: many tasks on one base. A file of only what trained, and several of them at once on a live model.

The base is the model as it stands without any adapter: a compressed one, or a pretrained one. A file holds what
trained, the head, and marks of all else, by which another base is refused. On a live model an adapter is a set of
tensors and layers that stand in the place of the base's, so swapping moves no weight. The words are those of peft.
"""

from recombine.core.adapters.file import save_adapter
from recombine.core.adapters.live import adapters, delete_adapter, disable_adapters, set_adapter
from recombine.core.adapters.loading import become, load_adapter
from recombine.core.adapters.mixing import mixed

__all__ = [
    "adapters",
    "become",
    "delete_adapter",
    "disable_adapters",
    "load_adapter",
    "mixed",
    "save_adapter",
    "set_adapter",
]
