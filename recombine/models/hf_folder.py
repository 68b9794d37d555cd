"""Where a transformers model lies: one folder with weights, config.json and tokenizer."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from pickle import UnpicklingError

from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from recombine.errors import UsageError, first_line
from recombine.models import packaged
from recombine.models.weights import hub_folder, silence
from recombine.runtime.mapped import release

UNREADABLE = (OSError, SafetensorError, UnpicklingError, EOFError, RuntimeError, ValueError, KeyError, TypeError)


def folder(
    name: str,
    ways: str,
    *,
    id: str | None,
    revision: str | None,
    tag: str | None,
    pretrained: bool,
    checkpoint: str | Path | None,
) -> Path | None:
    """The folder of a model: its ``checkpoint``, the package (``tag: packaged``), or the hub's ``id``; None: random.

    Args:
        ways: what a user can do who does not get at the hub.
    """
    if checkpoint is not None:
        if not (Path(checkpoint) / "config.json").is_file():
            raise UsageError(
                f"model.checkpoint={checkpoint} holds no config.json: give a folder that transformers saved, with the "
                f"tokenizer beside the weights"
            )
        return Path(checkpoint)
    if not pretrained:
        return None
    if tag == "packaged":
        if name not in packaged.FOLDERS:
            raise UsageError(f"model.tag=packaged: no package holds {name}: take model={' or '.join(packaged.FOLDERS)}")
        return packaged.FOLDERS[name]()
    if id is None:
        fix = "set model.checkpoint=FOLDER, or model.pretrained=false for random ones"
        raise UsageError(f"model.pretrained=true: nothing says where the weights of {name} are; {fix}")
    return hub_folder(name, id, revision, model_files, ways)


def model_files(names: Sequence[str]) -> list[str]:
    """The config, the tokenizer, and the weights in one form, safetensors where there are any."""
    weights = [n for n in names if fnmatch(n, "model*.safetensors")] or [n for n in names if n == "pytorch_model.bin"]
    rest = [n for n in names if "/" not in n and n.endswith((".json", ".model", ".txt"))]
    return weights + rest if weights and "config.json" in names else []


def read_tokenizer(source: Mapping, ways: str) -> PreTrainedTokenizerFast | None:
    """The tokenizer in the folder of a model by its ``recombine_source``; None: the model is random."""
    name, where = source["name"], {k: source[k] for k in ("id", "revision", "tag", "pretrained", "checkpoint")}
    path = folder(name, ways, **where)
    if path is None:
        return None
    try:
        with silence():
            return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (*UNREADABLE, ImportError) as error:
        raise UsageError(f"model {name}: no tokenizer in {path} ({first_line(error)}); complete the folder") from error


def bytes_only(special: Sequence[str]) -> Tokenizer:
    """The special tokens, then one for every byte; every text can be written in them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate([*special, *alphabet])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tokenizer


def refuse_damaged(name: str, path: Path, model: nn.Module, problems: Sequence[tuple[set[str], str]]) -> None:
    """Refuses a folder with tensors that are missing, too many or not finite.

    Args:
        problems: sets of tensor names, each with what is wrong with them, for example ({"x.weight"}, "lacks").

    Raises:
        UsageError: names the first tensor.
    """
    for keys, what in problems:
        if keys:
            raise UsageError(f"model {name}: {path} {what} {min(keys)}; give the folder of this architecture's weights")
    for key, tensor in model.named_parameters():
        if not tensor.isfinite().all():
            raise UsageError(f"model {name}: the weights in {path} are damaged: {key} is not finite; replace the file")
        release([tensor])
