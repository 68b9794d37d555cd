"""The attention modules whose heads can be made narrower, and where each keeps how wide they are."""

from typing import NamedTuple

from torch import nn

from recombine.errors import UsageError

WIDTH = {  # class of timm or transformers -> the attribute that holds the dimensions of a head; None: it has none
    "Attention": "head_dim",
    "WindowAttention": None,
    "BertSelfAttention": "attention_head_size",
    "RobertaSelfAttention": "attention_head_size",
    "XLMRobertaSelfAttention": "attention_head_size",
    "ElectraSelfAttention": "attention_head_size",
    "ViTAttention": "head_dim",
    "LlamaAttention": "head_dim",
    "MistralAttention": "head_dim",
    "Qwen2Attention": "head_dim",
}
TIMM = {  # modules that the class is timm's plain one in; others have classes of the same name
    "Attention": ("timm.layers.attention", "timm.models.vision_transformer"),
    "WindowAttention": ("timm.models.swin_transformer",),
}
ROTARY = ("LlamaAttention", "MistralAttention", "Qwen2Attention")  # turn pairs (i, i + width / 2) by the position
FIX = "give targets=[up,down,gate?], which leaves the attention as it is, where these layers stand apart"


class Heads(NamedTuple):
    """The heads of an attention module.

    queries: heads of q. keys: heads of k and of v; each serves queries / keys of q.
    width: dimensions of a head.
    rotary: q and k are turned by their position.
    scaled: the logits are divided by the root of whatever width there is, and not by a constant.
    """

    queries: int
    keys: int
    width: int
    rotary: bool
    scaled: bool


def heads(name: str, module: nn.Module) -> Heads:
    """The heads of the attention module of that name.

    Raises:
        UsageError: its heads cannot be made narrower.
    """
    kind, home = type(module).__name__, type(module).__module__
    normed = [key for key, part in module.named_children() if "norm" in key and not isinstance(part, nn.Identity)]
    if normed:
        raise UsageError(f"{name}.{normed[0]} normalises what would be cut: {FIX}")
    if kind not in WIDTH or not (home in TIMM[kind] if kind in TIMM else home.startswith("transformers.")):
        raise UsageError(f"{name} is a {kind}, whose heads cannot be made narrower: {FIX}")
    if getattr(module, "gate", None) is not None:
        raise UsageError(f"{name}.gate multiplies what would be cut: {FIX}")
    if kind in TIMM:
        width = getattr(module, "head_dim", module.proj.in_features // module.num_heads)
        return Heads(module.num_heads, module.num_heads, width, False, True)
    width = getattr(module, WIDTH[kind])
    if kind in ROTARY:
        groups = module.num_key_value_groups
        queries = module.config.num_attention_heads
        return Heads(queries, queries // groups, width, True, False)
    return Heads(module.num_attention_heads, module.num_attention_heads, width, False, False)


def narrow(module: nn.Module, width: int) -> None:
    """Says in an attention module that its heads have this many dimensions now. A constant scale stays."""
    kind = type(module).__name__
    if (key := WIDTH.get(kind)) is not None:
        setattr(module, key, width)
    if hasattr(module, "attn_dim"):
        module.attn_dim = module.num_heads * width
    if hasattr(module, "all_head_size"):
        module.all_head_size = module.num_attention_heads * width
    if kind in TIMM:
        module.scale = width**-0.5
