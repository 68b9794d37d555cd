"""Reads weights, from a file or timm's hub, and loads them strictly: every tensor, or one line that says which not."""

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from recombine.errors import UsageError
from recombine.runtime import hub
from recombine.runtime.digest import remembered_digest

log = logging.getLogger(__name__)

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
WAYS_OUT = "connect once, or give model.checkpoint=FILE, or take model=dinov2_s14 or model.pretrained=false"
FIX = "give the checkpoint of this architecture, or set model= to the checkpoint's"


def hub_file(name: str, arch_tag: str) -> Path:
    """The weights file of a timm tag: from the hub's cache, else downloaded.

    Args:
        name: of the model, for errors.
        arch_tag: for example "vit_small_patch16_224.augreg_in21k".

    Raises:
        UsageError: the hub has no such file, or cannot be reached.
    """
    config = get_pretrained_cfg(arch_tag)
    if config is None or not config.hf_hub_id:
        raise UsageError(f"model {name}: no hub has {arch_tag}: give model.checkpoint=FILE or model.pretrained=false")
    repo = f"{config.hf_hub_id}{arch_tag}" if config.hf_hub_id.endswith("/") else config.hf_hub_id
    files = [config.hf_hub_filename] if config.hf_hub_filename else HUB_FILES
    for file in files:
        if (cached := hub.cached_file(repo, file)) is not None:
            return cached
    try:
        folder = hub.snapshot(repo, None, lambda names: [file for file in files if file in names][:1])
    except UsageError as error:
        raise UsageError(f"model {name}: {repo} is not cached and the hub fails ({error}): {WAYS_OUT}") from error
    return next(folder / file for file in files if (folder / file).is_file())


def hub_folder(
    name: str, repo: str, revision: str | None, choose: Callable[[Sequence[str]], list[str]], ways: str
) -> Path:
    """The chosen files of a repository at a revision: from the hub's cache, else downloaded.

    Args:
        choose: names of files there are -> those to take; none where a needed one is missing.
        ways: what a user without this repository can do.
    """
    try:
        return hub.snapshot(repo, revision, choose)
    except UsageError as error:
        what = f"model {name}: {repo}@{(revision or 'main')[:8]}"
        raise UsageError(f"{what} is not cached and the hub fails ({error}): {ways}") from error


def origin(path: Path) -> dict:
    """Where the weights in a file or a folder come from: the hub's repository and commit, and the sha256 of each file.

    A file is read for it, once in a process: the hub's cache has its sha256 as its name, which a damaged file has too.
    """
    folder = path if path.is_dir() else path.parent
    forms = ("model*.safetensors", "pytorch_model.bin", "*/*.safetensors", "*/*.bin")  # the last two: of several parts
    files = [path] if path.is_file() else next(filter(None, (sorted(path.glob(form)) for form in forms)), [])
    part = {"sha256": {str(file.relative_to(folder)): remembered_digest(file) for file in files}}
    if folder.parent.name == "snapshots" and (repository := folder.parents[1].name).startswith("models--"):
        part = {"hub": repository.removeprefix("models--").replace("--", "/"), "commit": folder.name} | part
    return part


def load(model: nn.Module, path: Path, num_classes: int) -> int:
    """Fills a timm model from a file, with position embeddings resampled as timm does; only the classifier may differ.

    Returns:
        How many classes the file's own classifier tells apart; 0: it has none.

    Raises:
        UsageError: the file cannot be read, or does not fit.
    """
    state, wanted, head = read(path), model.state_dict(), _head_names(model)
    patch = "patch_embed.proj.weight"
    if patch in state and patch in wanted and state[patch].dim() == 4:  # timm would resample it: that is another model
        _same_shape(path, model, patch, state[patch], wanted[patch])
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        state = dict(convert(dict(state), model)) if convert else state
    except Exception as error:  # not this model's tensors: the comparison below names the first
        log.debug("timm cannot convert %s: %s", path, error)

    own = next((len(state[name]) for name in sorted(head) if name in state), 0)
    for name in sorted(head):
        if name in state and (name not in wanted or state[name].shape != wanted[name].shape):
            dropped = f"{name} {_shape(state.pop(name))}"
            say_once(f"{path}: its classifier {dropped} is dropped (num_classes={num_classes})")
        if name in wanted and name not in state:
            say_once(f"{path} gives no {name} {_shape(wanted[name])}: it starts at random")
            state[name] = wanted[name]
    for name, tensor in wanted.items():
        if name not in state:
            raise UsageError(f"{path} does not fit {_arch(model)}: it lacks {name} {_shape(tensor)}; {FIX}")
        _same_shape(path, model, name, state[name], tensor)
    for name, tensor in state.items():
        if name not in wanted:
            raise UsageError(f"{path} does not fit {_arch(model)}: its {name} {_shape(tensor)} is too much; {FIX}")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UsageError(f"{path} is damaged: {name} {_shape(tensor)} is not finite; delete or replace the file")
    model.load_state_dict(state, strict=True)
    return own


@cache
def say_once(line: str) -> None:
    """A line in the log, once a process: the tasks of a suite load the same weights."""
    log.info(line)


def load_named(model: nn.Module, path: Path, num_classes: int, given: bool) -> int:
    """`load`, whose errors name model.checkpoint where the user has given the file."""
    try:
        return load(model, path, num_classes)
    except UsageError as error:
        raise UsageError(f"model.checkpoint={error}" if given else str(error)) from error


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a torch file that holds nothing but tensors."""
    if not path.is_file():
        raise UsageError(f"{path} is no file: give the path of a .safetensors or torch file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler of what is no pickle stumbles in every way there is
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(". ")[:120]
        raise UsageError(f"{path} is truncated, damaged or no weights file ({reason}): replace it") from error
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UsageError(f"{path} holds no state dict: save model.state_dict(), or convert it to .safetensors")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _same_shape(path: Path, model: nn.Module, name: str, found: Tensor, wanted: Tensor) -> None:
    if found.shape != wanted.shape:
        shapes = f"{_shape(found)}, the model needs {_shape(wanted)}"
        raise UsageError(f"{path} does not fit {_arch(model)}: its {name} is {shapes}; {FIX}")


def _head_names(model: nn.Module) -> set[str]:
    names = model.pretrained_cfg.get("classifier") or ()
    return {f"{name}.{key}" for name in ([names] if isinstance(names, str) else names) for key in ("weight", "bias")}


def _arch(model: nn.Module) -> str:
    return model.pretrained_cfg["architecture"]


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


@contextmanager
def silence():
    """Silences transformers' bars and tables while the block runs; the loaders here say in one line what is wrong."""
    from transformers.utils import logging as transformers_logging  # slow to import, and timm's models need none of it

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
