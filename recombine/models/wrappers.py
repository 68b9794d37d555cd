"""The model inside what other libraries wrap around it."""

from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

from recombine.errors import UsageError


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, DataParallel's or DistributedDataParallel's wrapper, or the model itself.

    Raises:
        UsageError: it is no torch module.
    """
    if not isinstance(model, nn.Module):
        what = "a class" if isinstance(model, type) else f"a {type(model).__name__}"
        raise UsageError(f"model is {what}: give a torch.nn.Module, such as timm.create_model(...)")
    while isinstance(model, OptimizedModule | DataParallel | DistributedDataParallel):
        model = model._orig_mod if isinstance(model, OptimizedModule) else model.module
    return model
