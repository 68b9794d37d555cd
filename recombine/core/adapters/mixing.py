"""A batch whose samples belong to different adapters: each sample goes its own way through the layers that differ.

A layer that differs is called once for each adapter, on that adapter's rows. What the layers of several adapters share
(the basis of CRISP, the outer factors of the factored methods) is applied to all rows at once.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recombine.core.adapters.live import BASE, Live, held, switch
from recombine.errors import UsageError
from recombine.layers import RecombinedLinear
from recombine.models.fused_qkv import TRANSPOSED

Place = tuple[nn.Module, str]  # a module and the name of its child


@contextmanager
def mixed(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[nn.Module]:
    """Inside the block, sample i of every batch goes through the adapter adapter_names[i].

        with recombine.mixed(model, ["flowers", "birds", "__base__"]):
            logits = model(images)  # (3, ...)

    "__base__" is no adapter. The batch is the first axis of the model's inputs. Where heads tell different numbers of
    classes apart, the outputs are as wide as the largest, and what a smaller one lacks is -inf. Each sample's outputs
    are those of its adapter alone, up to rounding.

    Raises:
        UsageError: an adapter is not loaded, or adapters differ in something else than layers that take rows of the
            batch (a class token). Inside the block: the batch has another size, or a layer mixes its samples.
    """
    names = [str(name) for name in adapter_names]
    if isinstance(adapter_names, str) or not names:
        raise UsageError(f"adapter_names={adapter_names!r}: give a list with the name of each sample's adapter")
    inner, live = held(model, *(name for name in dict.fromkeys(names) if name != BASE))
    active = live.active
    switch(inner, live, None)
    places = list_places(inner)
    before = []
    try:
        for path, versions in layers_that_differ(inner, live, dict.fromkeys(names)).items():
            for owner, key in places[path]:
                before.append((owner, key, owner._modules[key]))
                layer = MixedLayer(path, [versions[name] for name in names], windowed(inner, path))
                owner._modules[key] = layer.train(owner.training)
        live.mixing = True
        yield model
    finally:
        live.mixing = False
        for owner, key, module in before:
            owner._modules[key] = module
        switch(inner, live, active)


def list_places(model: nn.Module) -> dict[str, list[Place]]:
    """All places of every module, by its first name."""
    named = dict(model.named_modules(remove_duplicate=False))
    first = {id(module): name for name, module in reversed(named.items())}
    places: dict[str, list[Place]] = {}
    for name, module in named.items():
        owner, _, key = name.rpartition(".")
        places.setdefault(first[id(module)], []).append((named[owner], key))
    return places


def windowed(model: nn.Module, path: str) -> bool:
    """Whether the layer stands in attention over windows, where each sample's windows are rows one after the other."""
    parts = path.split(".")
    return any(hasattr(model.get_submodule(".".join(parts[:i])), "window_size") for i in range(1, len(parts)))


def layers_that_differ(model: nn.Module, live: Live, names: Sequence[str]) -> dict[str, dict[str, nn.Module]]:
    """By path of a layer of the base: what stands there for each of these adapters.

    Raises:
        UsageError: they differ in something that is no layer by itself, or one of them in a part of another's layer.
    """
    by_adapter = {name: {} if name == BASE else versions_of(model, live, name) for name in names}
    paths = sorted({path for versions in by_adapter.values() for path in versions})
    for outer, path in zip(paths, paths[1:], strict=False):
        if path.startswith(f"{outer}."):
            raise UsageError(
                f"adapter_names: {outer} and {path} inside it differ; mix adapters of one method and targets"
            )
    return {
        path: {name: versions.get(path) or model.get_submodule(path) for name, versions in by_adapter.items()}
        for path in paths
    }


def versions_of(model: nn.Module, live: Live, name: str) -> dict[str, nn.Module]:
    """What an adapter has in the place of the base's layers, by path.

    Raises:
        UsageError: it differs in something that is no layer by itself.
    """
    paths, found, own = {id(m): path for path, m in model.named_modules()}, {}, {}
    for owner, table, without, with_it in live.named[name].changes:
        if (path := paths.get(id(owner))) is None:
            continue
        if table == "_modules":
            keys = [key for key in with_it if with_it[key] is not without.get(key)]
            found |= {f"{path}.{key}".lstrip("."): with_it[key] for key in keys}
            whole = with_it.keys() == without.keys()
        elif table is not None:
            own.setdefault(path, {})[table] = with_it
            whole = not owner._modules
        else:
            whole = not path or not owner._modules or all(key[0] == "_" or key == TRANSPOSED for key in with_it)
        if not whole:
            what = ", ".join(sorted(key for key in with_it if with_it[key] is not without.get(key))) or table
            why = "which is no layer by itself"
            raise UsageError(f"adapter_names: {name!r} has its own {path}.{what}".replace(" .", " ") + f", {why}")
    for path, tables in own.items():
        found[path] = copy.copy(model.get_submodule(path))
        vars(found[path]).update({key: table.copy() for key, table in tables.items()}, _kept=None)
    return found


class MixedLayer(nn.Module):
    """Stands in for a layer that several adapters have in versions of their own.

    Args:
        path: the layer's name, for messages.
        versions: of every sample of the batch.
        folds: whether a sample may have several rows of the first axis, one after the other.
    """

    def __init__(self, path: str, versions: Sequence[nn.Module], folds: bool):
        super().__init__()
        self.path, self.folds = path, folds
        self.versions = nn.ModuleList({id(v): v for v in versions}.values())
        number = {id(v): i for i, v in enumerate(self.versions)}
        self.which = torch.tensor([number[id(v)] for v in versions])

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """x (rows, ...) to the outputs of each row's version."""
        rows, samples = len(x), len(self.which)
        if args or x.ndim < 2 or rows != samples and not (self.folds and rows % samples == 0):
            why = "of which the samples of a batch cannot be told apart" if rows else "no rows"
            what = f"{self.path} is called with {tuple(x.shape)} for {samples} adapter_names"
            raise UsageError(f"{what}, {why}; give one name for each sample, or put each adapter on by itself")
        which = self.which.to(x.device).repeat_interleave(rows // samples)
        groups = [(which == i).nonzero().flatten() for i in range(len(self.versions))]
        back = torch.cat(groups).argsort()
        if self.shares(x):
            first = self.versions[0]
            return first.leave(self.apart([v.within for v in self.versions], first.enter(x), groups, back))
        return self.apart(self.versions, x, groups, back, **kwargs)

    def shares(self, x: Tensor) -> bool:
        """Whether the versions are alike but for what stands between the tensors that they share, and that pays."""
        first = self.versions[0]
        if not isinstance(first, RecombinedLinear) or not first.common():
            return False
        tensors = [[type(v), v.bias, *v.common()] if isinstance(v, RecombinedLinear) else [] for v in self.versions]
        alike = all(
            len(t) == len(tensors[0]) and all(a is b for a, b in zip(t, tensors[0], strict=True)) for t in tensors
        )
        tokens, train = x.numel() // first.in_features, torch.is_grad_enabled()
        return alike and not first.is_cheaper_built(tokens, train, kept=True)

    def apart(self, calls: Sequence, x: Tensor, groups: Sequence[Tensor], back: Tensor, **kwargs) -> Tensor:
        """Each call on its rows of x, and the outputs in the order of x; narrow ones are filled up with -inf."""
        parts = [call(x[rows], **kwargs) for call, rows in zip(calls, groups, strict=True)]
        width = max(part.shape[-1] for part in parts)
        parts = [F.pad(p, (0, width - p.shape[-1]), value=-torch.inf) if p.shape[-1] < width else p for p in parts]
        return torch.cat(parts)[back]

    @property
    def weight(self) -> Tensor:
        """There is none: the layer has to be called.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"{self.path} is not called in this model, its weight is read: put each adapter on by itself")
