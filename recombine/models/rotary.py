"""Rotary attention of transformers whose heads have lost some of their pairs of dimensions.

A pair (i, i + d/2) of a head of q and k is turned by the position times a frequency of its own. Once pairs are cut, and
other ones in every head, the frequencies must be selected too. Everything else is the class's own.
"""

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention


class SelectedRotary:
    """Goes before an attention class of transformers.

    Its buffer `turns` (keys, k) says which columns of the tables of positions belong to the k dimensions of each head.
    """

    def forward(
        self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **options
    ) -> tuple[Tensor, Tensor | None]:
        """As the class's own: hidden states (B, T, d) -> (B, T, d) and, of some implementations, the weights."""
        split = (*hidden_states.shape[:-1], -1, self.head_dim)
        layers = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (layer(hidden_states).view(split).transpose(1, 2) for layer in layers)  # (B, heads, T, k)
        cos, sin = (table[..., self.turns].transpose(1, 2) for table in position_embeddings)  # (B, keys, T, k)
        groups = q.shape[1] // k.shape[1]
        q = turned(q, cos.repeat_interleave(groups, 1), sin.repeat_interleave(groups, 1))
        k = turned(k, cos, sin)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        options |= self.windows()
        y, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **options)
        return self.o_proj(y.reshape(*split[:-2], -1).contiguous()), weights

    def windows(self) -> dict[str, int | None]:
        """What the class tells the attention of its window."""
        return {}


class SelectedLlamaAttention(SelectedRotary, LlamaAttention):
    """Llama's attention with some pairs of every head."""


class SelectedMistralAttention(SelectedRotary, MistralAttention):
    """Mistral's attention with some pairs of every head."""

    def windows(self) -> dict[str, int | None]:
        return {"sliding_window": getattr(self.config, "sliding_window", None)}


class SelectedQwen2Attention(SelectedRotary, Qwen2Attention):
    """Qwen2's attention with some pairs of every head."""

    def windows(self) -> dict[str, int | None]:
        return {"sliding_window": self.sliding_window}


SELECTED = {cls.__mro__[2]: cls for cls in (SelectedLlamaAttention, SelectedMistralAttention, SelectedQwen2Attention)}


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, heads, T, k) with its pairs (i, i + k/2) turned by the angles of these tables of the same shape."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def select(model: nn.Module, name: str, turns: list[list[int]]) -> None:
    """Puts the attention with these pairs in the place of the one of that name.

    Args:
        turns: (keys, k), columns of the tables of positions, of each head.
    """
    old = model.get_submodule(name)
    new = SELECTED[type(old)].__new__(SELECTED[type(old)])
    vars(new).update(vars(old))
    for key in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        vars(new)[key] = vars(old)[key].copy()
    weight = old.q_proj.weight
    device = "cpu" if weight.is_meta else weight.device
    new.register_buffer("turns", torch.tensor(turns, device=device))
    model.set_submodule(name, new)
