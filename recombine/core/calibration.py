"""Calibration: statistics of the target layers from one pass over a few batches.

Every statistic is a running sum in float64: at most one d x d matrix for a layer, never the activations. Layers that
read the same tensor (q, k and v of a block) share their input statistics. Tokens are pooled over batch and sequence.
Only non-padding tokens count, where the model is called with an `attention_mask` (B, T).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from weakref import ReferenceType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from recombine.core.layer_statistics import BACKWARD, KINDS, Inputs, Stats, end_batch, mirrored, statistics_hook
from recombine.errors import UsageError

Losses = Callable[[], Iterable[Tensor]]  # each call is a pass: one task loss, with its graph, per calibration batch


class Sums:
    """The running sums of some layers, to which hooks add whatever the model calls them with inside a `with` block.

    Args:
        sites: target layers of the model, as `find_sites` gives them.
        wanted: some of KINDS.
        mask: of `capture_attention_mask`.
    """

    def __init__(self, sites, wanted: set[str], mask: list[Tensor | None]):
        assert wanted <= KINDS.keys(), wanted
        self.sites, self.wanted, self.mask, self.backward = sites, wanted, mask, bool(wanted & BACKWARD)
        start = Inputs(layers=len(sites))
        self.stats = {site.name: Stats(inputs=start) for site in sites}
        # what a batch's inputs, by identity, turned earlier sums into; one that is gone may leave its id to another
        self.seen: dict[tuple[int, int], tuple[ReferenceType, Inputs]] = {}
        self.hooks: list[RemovableHandle] = []

    def __enter__(self) -> "Sums":
        anchor = torch.zeros((), requires_grad=True)  # where the graph begins: all weights are frozen
        for site in self.sites:
            hook = statistics_hook(self.stats[site.name], self.wanted, self.mask, self.seen, anchor)
            self.hooks.append(site.module.register_forward_hook(hook))
        return self

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()

    def end_batch(self) -> None:
        """Adds the finished batch."""
        for layer in self.stats.values():
            end_batch(layer, self.wanted)
        self.seen.clear()

    def means(self) -> dict[str, Stats]:
        """The sums as means, in their memory, by site name.

        Raises:
            UsageError: no batch or no gradient reached a layer, or a statistic is not finite.
        """
        normalise(self.stats, self.backward)
        return self.stats


def collect(model: nn.Module, sites, losses: Losses, wanted: set[str]) -> dict[str, Stats]:
    """Statistics of the target layers over all batches of `losses`, by site name.

    The model keeps its mode, its `requires_grad` flags and its gradients.

    Args:
        sites: target layers of the model, as `find_sites` gives them.
        losses: called once; yields one task loss per batch, with its graph.
        wanted: some of KINDS, such as {"inputs", "fisher"}.

    Raises:
        UsageError: no batch reached a layer, it is never called, the loss does not depend on it, or a statistic is not
            finite.
    """
    backward = bool(wanted & BACKWARD)
    with (
        capture_attention_mask(model) as mask,
        eval_frozen(model),
        torch.set_grad_enabled(backward),
        Sums(sites, wanted, mask) as sums,
    ):
        for loss in losses():
            if backward:
                if not loss.requires_grad:
                    check_called(sums.stats)
                need_graph(loss).backward()
            sums.end_batch()
    return sums.means()


def check_called(stats: dict[str, Stats]) -> None:
    """Checks, after the model ran, that it called every layer.

    Raises:
        UsageError: it did not.
    """
    idle = [name for name, layer in stats.items() if not layer.calls]
    if idle:
        why = "its weight is read instead, or nothing goes through it; leave its role out of targets"
        raise UsageError(f"calibration: {idle[0]} was not called while the model ran: {why}")


def need_graph(loss: Tensor) -> Tensor:
    """The loss, checked to have a graph.

    Raises:
        UsageError: it has none.
    """
    if not loss.requires_grad:
        why = "compute it with gradients on, and do not detach it"
        raise UsageError(f"losses() yields a loss without its graph: {why}")
    return loss


def passes(losses: Losses) -> Iterator[Tensor]:
    """The losses of batch after batch, pass after pass, without end.

    Raises:
        UsageError: a pass without a batch, or a loss without its graph.
    """
    while True:
        loss = None
        for loss in losses():
            yield need_graph(loss)
        if loss is None:
            raise UsageError("calibration: a pass had no batch: losses() must begin anew and yield at least one")


@contextmanager
def capture_attention_mask(model: nn.Module):
    """Yields a one-element list that holds the attention mask (B, T) of the model's last call, or None."""
    mask: list[Tensor | None] = [None]

    def look(_, args, kwargs):
        given = kwargs.get("attention_mask")
        mask[0] = given.bool() if isinstance(given, Tensor) and given.ndim == 2 else None

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield mask
    finally:
        hook.remove()


@contextmanager
def eval_frozen(model: nn.Module):
    """Holds the model in eval mode with all parameters frozen while the block runs, then restores both."""
    modes = {module: module.training for module in model.modules()}
    trains = [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for p in trains:
            p.requires_grad_(True)


def normalise(stats: dict[str, Stats], backward: bool) -> None:
    """Turns the sums into means, in place; input statistics that layers share are divided once.

    Args:
        backward: gradients were asked for.

    Raises:
        UsageError: no batch or no gradient reached a layer, or a statistic is not finite.
    """
    for name, layer in stats.items():
        if not layer.batches or layer.calls and not (layer.inputs.tokens or backward):
            raise UsageError(f"calibration: no batch reached {name}; give losses that yield at least one")
        check_called({name: layer})
        if backward and not layer.tokens:
            why = "the loss does not depend on it; leave its role out of targets"
            raise UsageError(f"calibration: no gradient reached {name}: {why}")
    for inputs in {id(layer.inputs): layer.inputs for layer in stats.values()}.values():
        count = max(inputs.tokens, 1)
        inputs.xx, inputs.x4 = over(mirrored(inputs.xx), count), inputs.x4 / count
        inputs.mean, inputs.absolute = over(inputs.mean, count), over(inputs.absolute, count)
    for name, layer in stats.items():
        count = max(layer.tokens, 1)
        layer.gg, layer.g4, layer.gx = over(mirrored(layer.gg), count), layer.g4 / count, over(layer.gx, count)
        layer.fisher = over(layer.fisher, max(layer.batches, 1))
        for value in (layer.inputs.xx, layer.inputs.mean, layer.inputs.absolute, layer.gg, layer.gx, layer.fisher):
            if isinstance(value, Tensor) and not all(end.isfinite() for end in value.aminmax()):
                raise UsageError(f"calibration: the statistics of {name} are not finite; use float32 or other batches")


def over(total: Tensor | float, count: int) -> Tensor | float:
    """total / count, in the memory of `total`."""
    return total.div_(count) if isinstance(total, Tensor) else total / count
