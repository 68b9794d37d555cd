"""What a layer has beside its weights and keeps when it is replaced: hooks, its class, and the places it stands in.
And functions that stand for modules for a while."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from recombine.layers import RecombinedLinear
from recombine.layers.base import own_class

log = logging.getLogger(__name__)

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@contextmanager
def kept_around(model: nn.Module):
    """After the block, what it put in a layer's place also has the layer's hooks, its class, and all its places.

    A layer that stood in several places is replaced in all of them. Hooks of torch.nn.utils stay behind: those compute
    the weight, which the new layer has taken over.
    """
    old = dict(model.named_modules(remove_duplicate=False))
    first = {id(module): name for name, module in reversed(old.items())}
    yield
    new = dict(model.named_modules(remove_duplicate=False))
    lost: dict[str, list[str]] = {}  # names of layers by a class that cannot be given back
    for name, module in old.items():
        owner, replacement = name.rpartition(".")[0], new.get(first[id(module)])
        if owner not in new or new[owner] is not old[owner] or replacement is None or replacement is module:
            continue
        if name != first[id(module)]:
            if new.get(name) is module:
                model.set_submodule(name, replacement)
            continue
        _move_hooks(module, replacement)
        if isinstance(replacement, RecombinedLinear):
            replacement.linear_class = own_class(module)
            if replacement.linear_class is not type(module) and not isinstance(module, RecombinedLinear):
                lost.setdefault(type(module).__name__, []).append(name)
    for kind, names in lost.items():
        text = "%s is a %s, as %d more; it holds more than a weight and a bias, so merging will give an nn.Linear"
        log.warning(text, names[0], kind, len(names) - 1)


def one_by_one(model: nn.Module) -> Callable[[str, nn.Module], None]:
    """put(name, layer), which puts an ordinary layer in the place of one of the model's.

    It does for one layer what `kept_around` does for many, and so it holds none of the old ones.
    """
    same: dict[int, list[str]] = {}  # names of a module, by its identity
    for name, module in model.named_modules(remove_duplicate=False):
        same.setdefault(id(module), []).append(name)
    places = {name: names for names in same.values() for name in names}

    def put(name: str, layer: nn.Module) -> None:
        old = model.get_submodule(name)
        if layer is not old:
            _move_hooks(old, layer)
            for place in places.get(name, [name]):
                model.set_submodule(place, layer)

    return put


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Moves the hooks with the tables that hold them, so that their handles still remove them."""
    for table in HOOKS:
        hooks = vars(old)[table]
        stay = {key: hook for key, hook in hooks.items() if type(hook).__module__.startswith("torch.nn.utils")}
        if len(hooks) == len(stay):
            continue
        for key in stay:
            del hooks[key]
        hooks.update(vars(new)[table])
        vars(old)[table], vars(new)[table] = OrderedDict(stay), hooks
        new._is_full_backward_hook = old._is_full_backward_hook


@contextmanager
def standing_for(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Until the block ends, each function is called in the place of its module's forward; hooks run as before."""
    own = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, before in own.items():
            vars(module).pop("forward", None)
            if before is not None:
                module.forward = before
