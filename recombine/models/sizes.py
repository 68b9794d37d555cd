"""The sizes of an architecture that a configuration may name: timm's and transformers' keys, with their ranges."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn

from recombine.errors import UsageError
from recombine.runtime.kinds import Count, Name, PartialShare, Positive, Weight
from recombine.runtime.schema import annotations, checked

Width = Annotated[int, Field(ge=1, le=2**20)]
Depth = Annotated[int, Field(ge=1, le=1024)]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Keys that several architectures share: what is built, and its sizes. None: the architecture's own."""

    name: Name | None = None
    arch: Name | None = None
    library: Literal["timm", "transformers", "diffusers"] = "timm"
    patch_size: Depth | None = None
    embed_dim: Width | None = None
    depth: Depth | None = None
    num_heads: Depth | Annotated[tuple[Depth, ...], Field(min_length=1)] | None = None
    depths: Annotated[tuple[Depth, ...], Field(min_length=1)] | None = None
    window_size: Depth | None = None
    mlp_ratio: Positive | None = None
    vocab_size: Annotated[int, Field(ge=1, le=2**24)] | None = None
    hidden_size: Width | None = None
    intermediate_size: Width | None = None
    num_hidden_layers: Depth | None = None
    num_attention_heads: Depth | None = None
    num_key_value_heads: Depth | None = None
    max_position_embeddings: Count | None = None
    rms_norm_eps: Positive | None = None
    initializer_range: Weight | None = None
    hidden_dropout_prob: PartialShare | None = None
    attention_probs_dropout_prob: PartialShare | None = None
    classifier_dropout: PartialShare | None = None
    cls_dropout: PartialShare | None = None


def check(config: Mapping[str, Any]) -> None:
    """Refuses a size that no architecture can have. Keys that are no sizes are left to whoever knows them.

    Raises:
        UsageError: names it.
    """
    checked(Sizes, {key: value for key, value in config.items() if key in annotations(Sizes)}, "model")


def require_image_size(model: nn.Module, image_size: int | None) -> None:
    """Refuses pictures of a size that a timm model was not built for. It would fail at the first of them.

    Raises:
        UsageError: names the size that fits.
    """
    embed = getattr(model, "patch_embed", None)
    if image_size is None or not getattr(embed, "strict_img_size", False) or embed.img_size is None:
        return
    if embed.img_size != (image_size, image_size):
        size = embed.img_size[0]
        fix = f"leave it out, or set model.image_size={image_size} too"
        raise UsageError(f"data.image_size={image_size}: the model reads pictures of {size} x {size}; {fix}")
