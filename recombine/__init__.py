"""recombine: compress a pretrained transformer, adapt it, or both at once.

model = timm.create_model("vit_small_patch16_224", pretrained=True)
recombine.apply(model, recombine.Cersa(alpha=0.95))     # now train it with any loop
recombine.count(model)                                  # parameters, bytes
recombine.save(model, "cersa.safetensors")
recombine.merge(model)                                  # an ordinary timm model again
"""

from recombine.torchvision_guard import guard

guard()

from recombine.budget import Account, Budget, count  # noqa: E402
from recombine.errors import UsageError  # noqa: E402
from recombine.export import load, merge, save  # noqa: E402
from recombine.layers import RecombinedLinear  # noqa: E402
from recombine.methods import *  # noqa: E402, F403
from recombine.methods import __all__ as _methods  # noqa: E402

__all__ = ["Account", "Budget", "RecombinedLinear", "UsageError", "count", "load", "merge", "save", *_methods]
