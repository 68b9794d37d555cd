"""The method of a run, and the one that compresses before it."""

from collections.abc import Mapping
from dataclasses import replace

from omegaconf import DictConfig

from recombine.core.method import Method
from recombine.core.pair import settled
from recombine.errors import UsageError
from recombine.methods.from_config import from_config
from recombine.runner.labels import chosen_labels
from recombine.runtime.schema import group


def ready(
    method: Method, compressor: Method | None, labels: Mapping[str, str], kind: str
) -> tuple[Method, Method | None]:
    """Both as they run: called by these labels, and settled for a budget of that kind."""
    method.label = labels["method"]
    if compressor is not None:
        compressor.label = labels["compressor"]
    return settled(method, compressor, kind)


def resolve_methods(cfg: DictConfig) -> tuple[Method, Method | None]:
    """The methods of a run: (the method, the compressor before it or None).

    A method with itself as the compressor is one method, which trains the factors that it compressed to.

    Raises:
        UsageError: the two cannot follow each other.
    """
    method = from_config(cfg.method)
    if cfg.get("compressor") is None:
        return method, None
    compressor = from_config(group(cfg.compressor, "compressor"), "compressor")
    name = chosen_labels(cfg)["compressor"]
    if not compressor.compresses:
        raise UsageError(f"method@compressor: {name} does not compress; choose one that does")
    if cfg.stage.name == "compress":
        raise UsageError("stage=compress applies the compressor alone: name it as method=, or take stage=joint")
    if type(compressor) is type(method):
        bare = [replace(part, lr=0.0, targets=()) for part in (method, compressor, type(method)())]
        if bare[0] not in bare[1:]:
            raise UsageError(
                f"method={name} after itself trains the compressor's factors: set its fields as compressor.*"
            )
        return compressor.copy(lr=method.lr), None
    return method, compressor
