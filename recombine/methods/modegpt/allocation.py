"""Which share of each block's weights is cut: by how much a block turns what goes through it (MoDeGPT, section 3.3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recombine.core.calibration import Losses, capture_attention_mask, eval_frozen
from recombine.core.layer_statistics import valid
from recombine.errors import UsageError
from recombine.models import roles


def turns(model: nn.Module, losses: Losses) -> Tensor:
    """1 - E[cos(x, y)] of every block, x its input and y its output, over all tokens: (blocks,), float64.

    Raises:
        UsageError: no batch reached a block, or its output has another width than its input.
    """
    blocks = roles.blocks(model)
    sums, counts = torch.zeros(len(blocks), dtype=torch.float64), [0] * len(blocks)

    def hook(i: int, mask: list):
        def add(_, args: tuple, options: dict, y: Tensor | tuple) -> None:
            x = args[0] if args else options["hidden_states"]
            y = y[0] if isinstance(y, tuple) else y
            if x.shape != y.shape:
                raise UsageError(f"block {i} has another output than input: give allocation=uniform")
            cosine = F.cosine_similarity(x.detach().float(), y.detach().float(), dim=-1)
            cosine = cosine if (keep := valid(mask, x)) is None else cosine[keep]
            sums[i] += cosine.double().sum().cpu()
            counts[i] += cosine.numel()

        return add

    with capture_attention_mask(model) as mask, eval_frozen(model), torch.no_grad():
        hooks = [block.register_forward_hook(hook(i, mask), with_kwargs=True) for i, block in enumerate(blocks)]
        try:
            for _ in losses():
                pass
        finally:
            for handle in hooks:
                handle.remove()
    if not all(counts):
        raise UsageError("calibration: no batch reached a block; give losses that yield at least one")
    return 1 - sums / torch.tensor(counts)


def sparsities(scores: Tensor, weights: Tensor, cut: float, smoothing: float, most: float) -> Tensor:
    """The share that each block loses: in proportion to softmax(-score / smoothing), at most `most`.

    What a block at that limit cannot lose is cut from the others, in the same proportion. Where the whole loses more
    than `most`, all blocks lose alike.

    Args:
        scores: of the blocks (B,).
        weights: of each block (B,).
        cut: the share that all blocks together lose.
    """
    if cut >= most:
        return torch.full_like(weights, cut)
    full = torch.zeros_like(weights, dtype=torch.bool)
    while True:
        share = (-scores / smoothing).masked_fill(full, -torch.inf).softmax(0)  # of the rest: all of it may underflow
        left = cut * weights.sum() - most * weights[full].sum()
        lost = share * left / (weights * share)[~full].sum()
        lost[full] = most
        if not (over := lost > most).any():
            return lost
        full |= over
