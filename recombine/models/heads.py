"""Where a model's outputs come from: its classification head, or a language model's output layer."""

import re

from torch import nn

from recombine.models.lookup import family


def head(model: nn.Module) -> nn.Module | None:
    """The classifier, several as one list of modules.

    None where the model ends in features, or in words: a language model's head is pretrained.
    """
    parts = _given_head(model)
    if parts is None:
        pattern, output = family(model).head, words(model)
        parts = [m for name, m in model.named_children() if re.fullmatch(pattern, name) and m is not output]
        parts = parts or next(filter(None, map(_given_head, model.children())), [])  # of the model that it wraps
    parts = [part for part in parts if next(part.parameters(), None) is not None]
    return parts[0] if len(parts) == 1 else nn.ModuleList(parts) if parts else None


def _given_head(model: nn.Module) -> list[nn.Module] | None:
    """What get_classifier() gives; None where a model has no such method."""
    if not hasattr(model, "get_classifier"):
        return None
    given = model.get_classifier()
    return list(given) if isinstance(given, tuple | list) else [given]


def output_layer(model: nn.Module) -> nn.Module | None:
    """The last linear layer of the head: its outputs are the classes. None where there is no head."""
    layers = [] if (classifier := head(model)) is None else list(classifier.modules())
    return next((layer for layer in reversed(layers) if hasattr(layer, "out_features")), None)


def classes(model: nn.Module) -> int | None:
    """How many classes the head tells apart; None where there is no head."""
    return None if (layer := output_layer(model)) is None else layer.out_features


def words(model: nn.Module) -> nn.Module | None:
    """The layer that a language model gives its words by."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
