"""Models by architecture and source: ``build("dinov2_s14", arch=..., tag="packaged")`` -> nn.Module.

``library: transformers`` in the YAML means ``encoders.py``, ``causal_lm.py`` or ``auto.py``, ``library: diffusers``
``diffusion.py``; the rest is timm's.
The weights come from exactly one place: a local ``checkpoint``; a package (``tag: packaged``); timm's hub under a
pinned ``tag``; or nowhere (``pretrained=False``, drawn from torch's current seed). All go through one strict load.

``model.own_classes`` says how many classes the weights' own classifier tells apart (0: they have none). It is in place
where ``num_classes`` is that number (``has_own_head``); data of other classes get a fresh one (``reset_head``).
"""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import timm
from timm.models import get_pretrained_cfg
from torch import nn

from recombine.errors import UsageError
from recombine.models import roles, sizes
from recombine.models.vision import timm_model
from recombine.runtime import conf, logs
from recombine.runtime.schema import checked

__all__ = [
    "build", "check", "for_data", "for_task", "has_own_head", "list_models", "modality", "objective", "reset_head",
    "schema", "tags", "timm_model", "tokenizer",
]  # fmt: skip

CONF = conf.CONF / "model"


def list_models() -> list[str]:
    """What ``model=`` takes.

    Raises:
        UsageError: the package is not in a clone.
    """
    conf.need_clone("list_models")
    return sorted(path.stem for path in CONF.glob("*.yaml"))


def build(name: str, *, arch: str | None = None, library: str = "timm", **config) -> nn.Module:
    """The model that a YAML of conf/model describes; ``model.recombine_source`` holds the arguments that build it, and
    ``model.recombine_weights`` the file or folder of its weights.

    Args:
        name: of the YAML, for example "dinov2_s14"; of timm, where there is no ``arch``; of the hub's repository or a
            folder with ``arch="auto"``.
        arch: of timm, for example "vit_small_patch14_dinov2", or the family of a transformers model, as "llama".
        library: "timm", "transformers" or "diffusers".
        config: the YAML's other keys. They are the arguments of `timm_model` or of the `build` of `encoders`,
            `causal_lm`, `auto` or `diffusion`.

    Raises:
        UsageError: there is no such architecture, its weights cannot be had, or they do not fit.
    """
    values = check(name, arch=arch, library=library, **config)
    return schema(name, library, values["arch"])(**values)


def check(name: str, *, arch: str | None = None, library: str = "timm", **config) -> dict:
    """The arguments of the function that builds such a model; nothing is built.

    Raises:
        UsageError: it takes no such key, or no such kind of value.
    """
    sizes.check({"name": name, "arch": arch, "library": library})
    if library == "timm" and arch is None:
        arch, _, tag = str(name).partition(".")
        config["tag"] = config.get("tag") or tag or None
    values = checked(schema(name, library, arch), {"name": name, "arch": arch} | config, "model")
    sizes.check(config)
    return values


def tokenizer(source: Mapping):
    """The tokenizer that belongs to a text model, by its ``recombine_source``.

    Raises:
        UsageError: the model knows fewer tokens.
    """
    found = _of_transformers(source["name"], source.get("library", "timm"), source["arch"]).tokenizer(source)
    known = source.get("vocab_size", len(found))
    if known < len(found) and not source["pretrained"] and source["checkpoint"] is None:  # others bring theirs
        raise UsageError(f"model.vocab_size={known}: the tokenizer has {len(found)} tokens; set it to that or more")
    return found


def modality(source: Mapping) -> str:
    """What a model reads, by its ``recombine_source``: "vision" or "text"; a prompt is text."""
    return "vision" if source.get("library", "timm") == "timm" or source.get("task") == "image" else "text"


def objective(source: Mapping) -> str:
    """What a model is for, by its ``recombine_source``: "lm", "denoising", or "classification" by a classifier."""
    if source.get("library") == "diffusers":
        return "denoising"
    return "lm" if source.get("arch") == "llama" or source.get("task") == "lm" else "classification"


def for_task(config: Mapping, task: str) -> dict:
    """A model's configuration with the task (lm, text, image) that the data are, where it names none itself."""
    return dict(config) | ({"task": task} if config.get("arch") == "auto" and config.get("task") is None else {})


def for_data(source: Mapping) -> dict:
    """The arguments of a data module's `attach_model`, of the model with this ``recombine_source``."""
    reads = partial(tokenizer, source) if modality(source) == "text" else None
    return {"source": source, "objective": objective(source), "tokenizer": reads}


def reset_head(model: nn.Module, num_classes: int) -> None:
    """Gives the model a fresh classifier, in place; 0 classes: none, features come out."""
    model.own_classes = 0
    if hasattr(model, "reset_classifier"):
        model.reset_classifier(num_classes)
    else:
        import_module("recombine.models.encoders").reset_head(model, num_classes)


def has_own_head(model: nn.Module) -> bool:
    """Whether the model's classifier is the one that came with its weights."""
    own = getattr(model, "own_classes", 0)
    return own > 0 and roles.classes(model) == own


def tags(arch: str, classes: int) -> list[str]:
    """Of timm's weights of an architecture those whose classifier tells that many classes apart."""
    tagged = timm.list_pretrained(f"{arch}.*")
    return [name.partition(".")[2] for name in tagged if get_pretrained_cfg(name).num_classes == classes]


def schema(name: str, library: str, arch: str) -> Callable[..., nn.Module]:
    """The function that builds a model; its arguments are the keys of the model's YAML."""
    return timm_model if library == "timm" else _of_transformers(name, library, arch).build


def require_diffusers(name: str) -> None:
    """Refuses a model of diffusers where that is not installed.

    Raises:
        UsageError: names the extra.
    """
    if find_spec("diffusers") is None:
        raise UsageError(f"model {name}: diffusers is not installed; pip install 'recombine[images]'")


def _of_transformers(name: str, library: str, arch: str):
    """The module for an architecture, imported on demand: transformers is slow to load."""
    if library == "timm":
        raise UsageError(f"model {name} sees pictures, not text: take model=minilm, or data=offline")
    if library == "diffusers":
        require_diffusers(name)
        with logs.quiet():  # diffusers tells which kernels it does not find
            return import_module("recombine.models.diffusion")
    if library != "transformers":
        raise UsageError(f"model.library={library}: must be timm, transformers or diffusers")
    return import_module(f"recombine.models.{ {'llama': 'causal_lm', 'auto': 'auto'}.get(arch, 'encoders') }")
