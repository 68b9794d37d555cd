"""Models of timm: the architecture, and its weights out of a file, a package or timm's hub."""

import difflib
from collections.abc import Mapping
from pathlib import Path

import timm
from omegaconf import ListConfig
from timm.models import get_pretrained_cfg
from torch import nn

from recombine.errors import UsageError
from recombine.models import allowed, packaged
from recombine.models.weights import hub_file, load_named
from recombine.runtime.kinds import Colours, Deviations, Name, PartialShare, Pixels, Place, Whole


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
