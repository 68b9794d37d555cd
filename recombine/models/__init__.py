"""Models by architecture and source: ``build("dinov2_s14", arch=..., tag="packaged")`` -> nn.Module.

``library: transformers`` in the YAML means ``encoders.py``, ``causal_lm.py`` or ``auto.py``; the rest is timm's.
The weights come from exactly one place: a local ``checkpoint``; a package (``tag: packaged``); timm's hub under a
pinned ``tag``; or nowhere (``pretrained=False``, drawn from torch's current seed). All go through one strict load.

``model.own_classes`` says how many classes the weights' own classifier tells apart (0: they have none). It is in place
where ``num_classes`` is that number (``has_own_head``); data of other classes get a fresh one (``reset_head``).
"""

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path

import timm
from omegaconf import ListConfig
from timm.models import get_pretrained_cfg
from torch import nn

from recombine.errors import UsageError
from recombine.models import allowed, packaged, roles, sizes
from recombine.models.weights import hub_file, load_named
from recombine.runtime import conf
from recombine.runtime.kinds import Colours, Deviations, Name, PartialShare, Pixels, Place, Whole
from recombine.runtime.schema import checked

__all__ = [
    "build", "check", "for_data", "for_task", "has_own_head", "list_models", "modality", "objective", "reset_head",
    "schema", "tags", "tokenizer",
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
        library: "timm" or "transformers".
        config: the YAML's other keys. They are the arguments of `timm_model` or of the `build` of `encoders`,
            `causal_lm` or `auto`.

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
    """What a model reads, by its ``recombine_source``: "vision" or "text"."""
    return "vision" if source.get("library", "timm") == "timm" or source.get("task") == "image" else "text"


def objective(source: Mapping) -> str:
    """What a model is for, by its ``recombine_source``: "lm", or "classification" where it has a classifier."""
    return "lm" if source["arch"] == "llama" or source.get("task") == "lm" else "classification"


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


def _of_transformers(name: str, library: str, arch: str):
    """The module for an architecture, imported on demand: transformers is slow to load."""
    if library == "timm":
        raise UsageError(f"model {name} sees pictures, not text: take model=minilm, or data=offline")
    if library != "transformers":
        raise UsageError(f"model.library={library}: must be timm or transformers")
    return import_module(f"recombine.models.{ {'llama': 'causal_lm', 'auto': 'auto'}.get(arch, 'encoders') }")


def timm_model(
    name: Name,
    *,
    arch: Name,
    tag: Name | None = None,
    pretrained: bool = True,
    checkpoint: Place | None = None,
    image_size: Pixels | None = None,
    num_classes: Whole = 0,
    drop_path: PartialShare = 0.0,
    attn_drop: PartialShare = 0.0,
    mean: Colours | None = None,
    std: Deviations | None = None,
    **timm_kwargs,
) -> nn.Module:
    """A timm model; ``model.recombine_source`` says where it came from, and how its images are normalised."""
    tag = _resolve_tag(name, arch, tag)
    kwargs = {key: tuple(x) if isinstance(x, list | ListConfig) else x for key, x in timm_kwargs.items()}
    allowed.timm_arguments(kwargs)
    source = arch if tag in (None, "packaged") else f"{arch}.{tag}"
    path = None  # looked for before the model is built: what is missing is said at once
    if checkpoint is not None:
        path = Path(checkpoint).expanduser()
    elif pretrained:
        path = packaged.WEIGHTS[name]() if tag == "packaged" else hub_file(name, source)
    size = {} if image_size is None else {"img_size": image_size}
    drops = {"drop_path_rate": drop_path, "attn_drop_rate": attn_drop}
    model = _create(name, arch, source, num_classes, {**size, **drops, **kwargs})
    config = model.pretrained_cfg
    image_size = image_size or config["input_size"][-1]
    _check_patches(name, model, image_size)
    model.own_classes = 0 if path is None else load_named(model, path, num_classes, checkpoint is not None)
    model.recombine_weights = path
    model.recombine_source = {
        "name": name,
        "arch": arch,
        "tag": tag,
        "pretrained": pretrained,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "image_size": image_size,
        "mean": list(mean or config["mean"]),
        "std": list(std or config["std"]),
        "drop_path": drop_path,
        "attn_drop": attn_drop,
        "num_classes": num_classes,
        **{key: list(x) if isinstance(x, tuple) else x for key, x in kwargs.items()},
    }
    return model


def _create(name: str, arch: str, source: str, num_classes: int, arguments: Mapping) -> nn.Module:
    """Builds timm's model, without weights.

    A dropout of 0 is left out for an architecture that has no such dropout.

    Raises:
        UsageError: timm refuses the arguments.
    """
    try:
        return timm.create_model(source, num_classes=num_classes, **arguments)
    except Exception as error:  # timm checks little, and stumbles over sizes in every way there is
        lacked = [key for key in arguments if f"unexpected keyword argument '{key}'" in str(error)]
        if lacked and lacked[0] in ("drop_path_rate", "attn_drop_rate") and not arguments[lacked[0]]:
            return _create(name, arch, source, num_classes, {k: v for k, v in arguments.items() if k != lacked[0]})
        given = " ".join(f"{key}={value}" for key, value in arguments.items())
        reason = " ".join(str(error).split()) or f"timm's {type(error).__name__}"
        raise UsageError(f"model {name}: {arch} cannot be built with {given} ({reason}): correct it") from error


def _resolve_tag(name: str, arch: str, tag: str | None) -> str | None:
    """The tag that is meant where none is given: the packaged weights, else timm's default."""
    if arch == "timm":
        raise UsageError("model=timm: say which architecture: model.name=eva02_base_patch14_224")
    known = timm.list_models()
    if arch not in known:
        close = ", ".join(difflib.get_close_matches(arch, known, n=3, cutoff=0.4)) or "one of timm.list_models()"
        key = "name" if name.partition(".")[0] == arch else "arch"
        raise UsageError(f"model.{key}={arch} is no timm architecture: did you mean {close}?")
    tags = [tagged.partition(".")[2] for tagged in timm.list_pretrained(f"{arch}.*")]
    if tag is None:
        return "packaged" if name in packaged.WEIGHTS else get_pretrained_cfg(arch).tag or None
    if tag == "packaged" and name not in packaged.WEIGHTS:
        raise UsageError(f"model.tag=packaged: no package holds {name}: take model={' or '.join(packaged.WEIGHTS)}")
    if tag != "packaged" and tag not in tags:
        raise UsageError(f"model.tag={tag} is no set of weights of {arch}: choose from {', '.join(tags) or 'none'}")
    return tag


def _check_patches(name: str, model: nn.Module, image_size: int) -> None:
    """Refuses an image size that patches do not divide. timm builds such a ViT, and fails at the first image.

    Raises:
        UsageError: names the sizes nearby that fit.
    """
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
    patch = patch[0] if isinstance(patch, tuple | list) else patch
    if image_size < patch or image_size % patch:
        near = max(patch, image_size // patch * patch)
        fix = f"take {near} or {near + patch}"
        raise UsageError(f"model {name}: image_size={image_size} is no multiple of the patch size {patch}: {fix}")
