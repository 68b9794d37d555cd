"""From the moments of one attention or MLP to its smaller tensors, and from those to the model."""

import torch
from torch import Tensor, nn

from recombine.core.sites import parent
from recombine.methods.modegpt.blocks import Attention, Neurons, Part
from recombine.methods.modegpt.closed_forms import Affine, largest, leverage, query_key, stacked, value_output
from recombine.methods.pruning.base import say_neurons
from recombine.methods.pruning.compensation import Moments, compensated
from recombine.models import fused_qkv
from recombine.models.attention import narrow
from recombine.models.fused_qkv import Layout, SplitLinear


def mlp(
    part: Neurons, moments: Moments, width: int, ridge: float, damping: float, intercept: bool
) -> dict[str, Tensor]:
    """kept (k,), weight (m, k) of down, and its bias (m,) where it has one: the neurons that stay, and what down gains.

    Args:
        ridge: of the scores. damping: of the compensation.
        intercept: moments are centred where down has a bias.
    """
    down = part.out.module
    centre = intercept and down.bias is not None
    kept = largest(leverage(moments.centred() if centre else moments.second, ridge), width)
    weight, bias = compensated(down.weight, down.bias, moments, kept, damping, intercept)
    found = {"kept": kept, "weight": weight.to(down.weight)}
    return found if bias is None else found | {"bias": bias.to(down.bias)}


def attention(part: Attention, moments: Moments, width: int, select: bool, intercept: bool) -> dict[str, Tensor]:
    """Weights and biases of q, k, v and o with so many dimensions a head; "turns" (keys, k) where positions turn them.

    Args:
        select: dimensions of q and k are selected. intercept: as in `closed_forms`.
    """
    heads, o, groups = part.heads, part.out.module, part.heads.queries // part.heads.keys
    q, k, v = projections(part)
    outs = list(o.weight.detach().double().chunk(heads.queries, dim=1))
    fold, rows, turns = o.bias is not None, {"q": [], "k": [], "v": []}, []
    shift, columns = None if o.bias is None else o.bias.detach().double().clone(), []
    for i, (queries, key, value) in enumerate(
        zip(batches(q.heads(heads.queries), groups), k.heads(heads.keys), v.heads(heads.keys), strict=True)
    ):
        how = {"rotary": heads.rotary, "select": select, "centre": intercept}
        queries, key, stay = query_key(queries, key, moments, width, **how)
        mine = outs[i * groups : (i + 1) * groups]
        value, mine, shifts = value_output(value, mine, moments, width, fold=fold, centre=intercept)
        rows["q"] += queries
        rows["k"].append(key)
        rows["v"].append(value)
        columns += mine
        turns += [stay] if heads.rotary else []
        for one in shifts:
            shift += one
    new = {role: stacked(parts) for role, parts in rows.items()}
    if heads.scaled:  # the attention divides by the root of the new width
        factor = (width / heads.width) ** 0.5
        new["q"] = Affine(factor * new["q"].weight, factor * new["q"].bias)
    found = {f"{role}.weight": affine.weight.to(o.weight) for role, affine in new.items()}
    found |= {f"{role}.bias": affine.bias.to(o.weight) for role, affine in new.items()}
    found["o.weight"] = torch.cat(columns, 1).to(o.weight)
    if shift is not None:
        found["o.bias"] = shift.to(o.weight)
    if turns:
        found["turns"] = torch.stack(turns)
    return found


def batches(parts: list, size: int) -> list[list]:
    """So many at a time."""
    return [parts[i : i + size] for i in range(0, len(parts), size)]


def projections(part: Attention) -> list[Affine]:
    """q, k and v, of one fused layer or of three."""
    if len(part.read) == 3:
        return [Affine.of(site.module.weight, site.module.bias) for site in part.read]
    whole = Affine.of(part.read[0].module.weight, part.read[0].module.bias)
    return whole.heads(3)


def put(model: nn.Module, part: Part, tensors: dict[str, Tensor], width: int) -> None:
    """Puts the smaller tensors into the layers of a part, in place."""
    out = part.out.module
    if isinstance(part, Neurons):
        kept = tensors["kept"]
        say_neurons(model.get_submodule(parent(part.name)), part.width, width)
        for site in part.into:
            layer, rows = site.module, kept.to(site.module.weight.device)
            replace(layer, layer.weight.detach()[rows], None if layer.bias is None else layer.bias.detach()[rows])
        replace(out, tensors["weight"], tensors.get("bias"))
        return
    parts = [(tensors[f"{role}.weight"], tensors[f"{role}.bias"]) for role in "qkv"]
    if len(part.read) == 1:
        parts = [tuple(torch.cat(both) for both in zip(*parts, strict=True))]
    for site, (weight, bias) in zip(part.read, parts, strict=True):
        replace(site.module, weight, None if site.module.bias is None else bias)
    replace(out, tensors["o.weight"], tensors.get("o.bias"))
    narrow(model.get_submodule(part.name), width)


def replace(layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Gives a linear layer other tensors, frozen, and their sizes."""
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
    layer.out_features, layer.in_features = weight.shape


def select(model: nn.Module, turns: dict[str, list[list[int]]]) -> None:
    """Has the attentions of these names turn only these columns of the tables of positions, for each head."""
    if turns:
        from recombine.models import rotary  # imports transformers' models, which is slow

        for name, columns in turns.items():
            rotary.select(model, name, columns)


def fuse(model: nn.Module) -> list[str]:
    """Fuses q, k and v where one layer was split into them; returns the names of those layers."""
    others = (n for n, m in model.named_modules() if isinstance(m, SplitLinear) and m.parts != ("q", "k", "v"))
    return fused_qkv.fuse(model, frozenset(others))


def rejoin(model: nn.Module) -> None:
    """Says in the split layers how wide their parts are now."""
    for module in model.modules():
        if isinstance(module, SplitLinear):
            rows = [getattr(module, name).out_features for name in module.parts]
            module.layout = Layout(module.layout.groups, tuple(row // module.layout.groups for row in rows))
            module.out_features = sum(rows)
