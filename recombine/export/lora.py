"""The difference of a recombined model to its pretrained weights as a LoRA adapter (arXiv 2106.09685), for peft."""

import json
import logging
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from recombine import models
from recombine.core.checkpoint import merged_copy
from recombine.errors import UsageError
from recombine.layers.packed import packed_in
from recombine.linalg import svd
from recombine.models import roles
from recombine.models.fused_qkv import OPENED, READS, is_transposed
from recombine.models.wrappers import unwrapped
from recombine.runtime.atomic import atomic_write
from recombine.runtime.mapped import release

log = logging.getLogger(__name__)


def to_lora(
    model: nn.Module,
    base: nn.Module | None = None,
    rank: int | None = None,
    energy: float | None = None,
    folder: Path | None = None,
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
    """(B (m, r), A (r, n)) of every linear layer that differs from the base, and what each leaves out.

    W = W_base + B A (of a transposed layer, of its transpose), by the truncated SVD of the difference in float64. The
    second is |W - W_base - B A| over |W - W_base|, in the Frobenius norm.

    Args:
        base: the model with the weights before; None: it is built from the note of its source.
        rank: at most so many directions a layer. energy: as many as hold this share of the squared difference. With
            neither, all that lie above the rounding of the weights.
        folder: in which the merged weights lie meanwhile, as nameless files; None: the system's for temporary files.

    Raises:
        UsageError: something else than linear layers and the head differs, or rank and energy make no sense.
    """
    model = unwrapped(model)
    if not hasattr(model, "recombined"):
        raise UsageError(f"this {type(model).__name__} is not recombined: there is no difference to write")
    if packed_in(model):
        why = "a LoRA cannot hold how packed weights were rounded"
        raise UsageError(f'{why}: export it as "hf", or export the run with quantize.bits=null')
    if rank is not None and (energy is not None or not isinstance(rank, int) or rank < 1):
        raise UsageError(f"rank={rank}, energy={energy}: give a rank of 1 or more, or an energy, not both")
    if energy is not None and not (isinstance(energy, float | int) and 0 < energy <= 1):
        raise UsageError(f"energy={energy}: must be a share above 0 and up to 1, such as 0.99")
    merged = merged_copy(model, folder)
    base = pretrained(model) if base is None else base
    factors, errors = {}, {}
    for name, weight, before in different(merged, base):
        u, s, vh = svd(weight.double() - before)
        k = kept(s, before, rank, energy)
        if k:
            root = s[:k].sqrt()
            factors[name] = ((u[:, :k] * root).to(weight.dtype), (root[:, None] * vh[:k]).to(weight.dtype))
            errors[name] = float(s[k:].norm() / s.norm())
    return factors, errors


def kept(s: Tensor, before: Tensor, rank: int | None, energy: float | None) -> int:
    """How many of the singular values s are kept."""
    m, n = before.shape
    # four times the spectral norm of the rounding of a matrix with entries of this size
    noise = 4 * torch.finfo(before.dtype).eps * float(before.double().norm()) * (m**0.5 + n**0.5) / (m * n) ** 0.5
    above = int((s > noise).sum())
    if energy is not None:
        shares = s.square().cumsum(0) / s.square().sum()
        return min(above, int((shares < energy).sum()) + 1)
    return above if rank is None else min(above, rank)


def different(merged: nn.Module, base: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
    """(name, weight, weight before) of the linear layers that differ, without the head.

    Raises:
        UsageError: anything else differs, which a LoRA cannot hold, or a layer is read instead of being called.
    """
    fix = 'export(..., "hf") or "dense" holds all'
    if type(merged) is not type(base):
        raise UsageError(f"base is a {type(base).__name__}, not a {type(merged).__name__}: give the model of before")
    kinds = {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear) or is_transposed(m)}
    linear = {f"{name}.weight": name for name in kinds}
    head = {id(p) for h in filter(None, (roles.head(merged), roles.head(base))) for p in h.parameters()}
    before, found = dict(base.named_parameters()), []
    for name, p in merged.named_parameters():
        if id(p) in head:
            continue
        if name not in before or before[name].shape != p.shape:
            raise UsageError(f"{name} is not of the shape that the base has: a LoRA cannot hold it; {fix}")
        same = torch.equal(p, before[name])
        release([p, before[name]])
        if same:
            continue
        if name not in linear:
            raise UsageError(f"{name} differs from the base and is no weight of a linear layer: {fix}")
        require_called(base, linear[name])
        pair = p.detach(), before[name].detach()
        found.append((linear[name], *((t.T for t in pair) if is_transposed(kinds[linear[name]]) else pair)))
    return found


def require_called(model: nn.Module, name: str) -> None:
    """Refuses a layer whose weight its owner reads, so that an adapter on it would do nothing.

    Raises:
        UsageError: names the layer.
    """
    holder, _, leaf = name.rpartition(".")
    owner = model.get_submodule(holder)
    if leaf == "qkv" and getattr(owner, READS, True) in (False, OPENED) and getattr(owner, "q_bias", None) is not None:
        why = f"{type(owner).__name__} reads its weight instead of calling it, and an adapter there would do nothing"
        raise UsageError(f'{name}: {why}; export(..., "dense") holds the difference')


def pretrained(model: nn.Module) -> nn.Module:
    """The model that a recombined one was made from, by its note.

    Raises:
        UsageError: it has none, or weights that were drawn.
    """
    if (source := getattr(model, "recombine_source", None)) is None:
        raise UsageError("this model was your own: give base=, the same model with the weights of before")
    if not (source.get("pretrained") or source.get("checkpoint")):
        raise UsageError("this model started at random: give base=, the same model with the weights of before")
    base, classes = models.build(**source), roles.classes(model)
    if classes and roles.classes(base) != classes:
        models.reset_head(base, classes)
    return base


def write(model: nn.Module, folder: Path, base: nn.Module | None, rank: int | None, energy: float | None) -> Path:
    """Writes the adapter into a folder that is there; the head, where there is one, is kept whole in it.

    Raises:
        UsageError: as in `to_lora`, or nothing differs.
    """
    import peft

    factors, errors = to_lora(model, base, rank, energy, folder)
    if not factors:
        raise UsageError("no linear layer differs from the base: there is nothing for a LoRA to hold")
    head = roles.head(model)
    parts = [] if head is None else [*head] if isinstance(head, nn.ModuleList) else [head]
    heads = [name for name, module in model.named_modules() if any(module is part for part in parts)]
    ranks = {re.escape(name): a.shape[0] for name, (_, a) in factors.items()}
    largest = max(ranks.values())
    config = peft.LoraConfig(
        r=largest,
        lora_alpha=largest,
        target_modules=sorted(factors),
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        modules_to_save=heads or None,
        inference_mode=True,
    )
    config.save_pretrained(folder)
    tensors = {}
    for name, (b, a) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    for name, part in ((name, model.get_submodule(name)) for name in heads):
        tensors |= {f"base_model.model.{name}.{key}": p.detach().contiguous() for key, p in part.named_parameters()}
    with atomic_write(folder / "adapter_model.safetensors") as temporary:
        save_file(tensors, temporary, {"format": "pt"})
    (folder / "errors.json").write_text(json.dumps(errors, indent=2), encoding="utf-8")
    worst = max(errors, key=errors.get)
    if errors[worst] > 1e-4:
        log.warning("lora: not exact, %s leaves out %.2g of its difference; give a larger rank", worst, errors[worst])
    return folder
