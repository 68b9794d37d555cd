"""Rank and bits of every layer chosen together under one budget of bytes (`quantize.bits=auto`).

A layer's candidates are the dense layer and a grid of ranks below it, each in float, with 8 bits and with 4. Each is
built and packed as it would be stored, so its bytes are counted, and its error has the rounding in it. What it loses is
how far it moves the model's outputs y, squared, to first order. With D the change of its weight and g_t the gradient of
v^T y at the layer's output, v random signs, the outputs of a sample move by E_v (sum_t g_t^T D x_t)^2 over its tokens.
With x_t = a + r_t, a their mean, and independent r_t, the calibration's samples s together lose

    sum_s ((sum_t g_t)^T D a)^2 + T tr(C_g D C_r D^T),   C_g = E[g g^T], C_r = E[r r^T] over all T tokens.

The second term is K-FAC's (arXiv 1503.05671) for a squared error, the first is what moves all tokens alike. That needs
no labels, and layers compare. Errors of layers are taken to add up. A knapsack (allocation.py) spends the bytes.
D C_r D^T is estimated from random signs, the same for all candidates of a layer.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from recombine.core.account import bytes_of
from recombine.core.budget import Room
from recombine.core.calibration import Losses, capture_attention_mask, collect
from recombine.core.layer_statistics import Stats, valid
from recombine.core.memory import device_of
from recombine.core.method import Site
from recombine.core.quantizing import put_packed
from recombine.layers.packed import BITS, Packed
from recombine.methods.allocation import lagrangian
from recombine.methods.svd.divergence import logits_of
from recombine.runtime import progress

if TYPE_CHECKING:
    from recombine.methods.svd.allocated import Allocated

KINDS = {"inputs", "outputs"}  # of statistics
RANKS = 12  # of a layer that are tried, at most
PROBES = 128  # inputs that stand for C_x


class Candidate(NamedTuple):
    """One way to store a layer: its bytes, what it loses, the rank (None: dense) and the bits (None: float)."""

    bytes: int
    loss: float
    rank: int | None
    bits: int | None


@torch.no_grad()
def choose(method: "Allocated", model: nn.Module, sites: list[Site], room: Room, losses: Losses) -> list[Candidate]:
    """The candidate of every layer that lose least together within the room.

    Args:
        method: its statistics are digested.

    Raises:
        UsageError: the smallest candidates take more.
    """
    found: dict[str, list[Candidate]] = {}
    for part in method.memory.passes([[site] for site in sites], KINDS, device_of(model)):
        own = [site for group in part for site in group]
        once = Pass(model, own, losses)
        stats = collect(model, own, once.losses, KINDS)
        for site in progress.of(own, "rank and bits", "layers"):
            known = Known.of(stats.pop(site.name), once.means.pop(site.name))
            found[site.name] = efficient(candidates(method, site, known, room.budget.packing.group))
    options = [found[site.name] for site in sites]
    room.require(sum(some[0].bytes for some in options))
    costs = [torch.tensor([one.bytes for one in some], dtype=torch.float64) for some in options]
    lost = [torch.tensor([one.loss for one in some], dtype=torch.float64) for some in options]
    return [some[i] for some, i in zip(options, lagrangian(costs, lost, room.bytes), strict=True)]


class Mean(NamedTuple):
    """Of the samples in one call of a layer: the means a (B, n), the sums of g (B, m), and the tokens (B,)."""

    inputs: Tensor
    gradients: list[Tensor]  # one, once the backward has passed
    tokens: Tensor


class Pass:
    """A pass over the calibration that puts v^T y in the place of each loss and notes `means`, by site name."""

    def __init__(self, model: nn.Module, sites: list[Site], losses: Losses):
        self.model, self.sites, self.given = model, sites, losses
        self.means: dict[str, list[Mean]] = {site.name: [] for site in sites}
        self.sums: list[Tensor] = []  # v^T y of the batch's calls
        self.generator = torch.Generator().manual_seed(0)

    def losses(self) -> Iterator[Tensor]:
        """v^T y of each batch; the loss itself where the model returns no logits."""
        hooks = [self.model.register_forward_hook(self.project, with_kwargs=True)]
        with capture_attention_mask(self.model) as mask:
            hooks += [site.module.register_forward_hook(partial(self.note, site.name, mask)) for site in self.sites]
            try:
                for loss in self.given():
                    yield sum(self.sums) if self.sums else loss
                    self.sums.clear()
            finally:
                for hook in hooks:
                    hook.remove()

    def project(self, _, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Adds v^T y of one call of the model. Padding has no output."""
        if (y := logits_of(output)) is None:
            return
        signs = random_signs(y.shape, self.generator).to(y.device)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == y.shape[:-1]:
            signs *= mask[..., None]
        self.sums.append((y.float() * signs).sum())

    def note(self, name: str, mask: list[Tensor | None], _, args: tuple, y: Tensor) -> None:
        """Notes the means of one call of a layer."""
        x = args[0].detach()
        keep = torch.ones(x.shape[:-1], device=x.device) if (kept := valid(mask, x)) is None else kept
        keep = (keep.flatten(1) if keep.ndim > 1 else keep[:, None]).double()  # (B, T)
        tokens = keep.sum(1)
        gradients: list[Tensor] = []

        def summed(values: Tensor) -> Tensor:  # (B, ..., d) -> (B, d)
            return torch.einsum("btd,bt->bd", values.detach().double().reshape(*keep.shape, -1), keep)

        y.register_hook(lambda g: gradients.append(summed(g)))
        self.means[name].append(Mean(summed(x) / tokens.clamp(min=1)[:, None], gradients, tokens))


class Known(NamedTuple):
    """What calibration says of a layer (m, n): a (S, n), r (probes, n), sum_t g_t (S, m) and T C_g (m, m)."""

    means: Tensor
    rest: Tensor
    gradients: Tensor
    outside: Tensor

    @classmethod
    def of(cls, stats: Stats, noted: list[Mean]) -> "Known":
        """From a layer's statistics and what was noted of its samples."""
        noted = [mean for mean in noted if mean.gradients]
        means, tokens = torch.cat([mean.inputs for mean in noted]), torch.cat([mean.tokens for mean in noted])
        between = (means * tokens[:, None]).T @ means / tokens.sum()
        rest = probes(stats.inputs.xx - between)
        gradients = torch.cat([mean.gradients[0] for mean in noted]).float()
        return cls(means.float(), rest.float(), gradients, stats.tokens * stats.gg.float())

    def lost(self, old: nn.Module, new: nn.Module) -> float:
        """What a change of the layer loses."""
        alike, apart = (new(x) - old(x) for x in (self.means, self.rest))
        return float((alike * self.gradients).sum(1).square().sum() + ((apart @ self.outside) * apart).sum())


@torch.no_grad()
def candidates(method: "Allocated", site: Site, known: Known, group: int) -> Iterator[Candidate]:
    """All ways to store a layer."""
    dense = stored(method, site, None, None, group)
    size = bytes_of(dense)
    yield Candidate(size, 0.0, None, None)
    dense.float()
    for k in (None, *grid(method.max_rank(site))):
        for bits in (None, *BITS) if k is not None else BITS:
            if (layer := stored(method, site, k, bits, group)) is not None:
                yield Candidate(bytes_of(layer), known.lost(dense, layer.float()), k, bits)


def grid(most: int) -> range:
    """The ranks that are tried up to `most`, evenly spaced: multiples of 8 where there are that many."""
    unit = 8 if most >= 8 * RANKS else 1
    step = unit * -(-most // (unit * RANKS))
    return range(step, most + 1, step) if most else range(0)


def stored(method: "Allocated", site: Site, k: int | None, bits: int | None, group: int) -> nn.Module | None:
    """The layer as it would be stored, without its bias; None: a matrix has fewer entries than one group."""
    if k is None:
        layer = nn.Linear(site.module.in_features, site.module.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(site.module.weight.detach(), requires_grad=False)
    else:
        layer = method.layer(site, k)
        method.finish([layer])
        layer.bias = None  # the model's own
    matrices = [name for name, p in layer.named_parameters() if p.ndim > 1]
    if bits is not None and any(layer.get_parameter(name).numel() < group for name in matrices):
        return None
    holder = nn.ModuleList([layer]).eval()
    for name in matrices if bits is not None else ():
        put_packed(holder, f"0.{name}", packing(bits, group))
    return holder[0]


def packing(bits: int, group: int) -> Callable[[Tensor], Packed]:
    """Packs a tensor to so many bits."""
    return lambda p: Packed.of(p, bits, group)


def probes(moment: Tensor) -> Tensor:
    """Rows x (r, n) with sum(x x^T) = C (n, n): exactly, or on average where n is more than PROBES."""
    values, vectors = torch.linalg.eigh(moment)
    root = vectors * values.clamp(min=0).sqrt()  # rounding leaves some of them below 0
    if len(moment) <= PROBES:
        return root.T
    signs = random_signs((PROBES, len(moment)), torch.Generator().manual_seed(0)).to(root)
    return signs @ root.T / PROBES**0.5


def random_signs(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """1 or -1 each, drawn on a CPU."""
    return torch.randint(2, shape, generator=generator).float().mul_(2).sub_(1)


def efficient(options: Sequence[Candidate] | Iterator[Candidate]) -> list[Candidate]:
    """Those that no other one undercuts in bytes without losing more: bytes rise, losses fall."""
    kept: list[Candidate] = []
    for one in sorted(options):
        if not kept or one.loss < kept[-1].loss and one.bytes > kept[-1].bytes:
            kept.append(one)
    return kept
