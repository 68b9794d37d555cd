"""What the methods of a run are called: the words that the user typed."""

from collections.abc import Mapping
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from recombine import results
from recombine.runtime import conf

METHODS = conf.CONF / "method"
CHOICES = {"method": "method", "compressor": "method@compressor"}  # part of the configuration -> Hydra's group


def chosen_labels(cfg: DictConfig) -> dict[str, str]:
    """The words that the user chose the methods by: {"compressor": "svd", "method": "lora"}.

    Without a compressor there is no such key. A word counts while its YAML names the class that runs, so with
    `method=svd method._target_=mine.Half` the method is called "half". Without Hydra the word is that of `label_of`.
    """
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    labels = {}
    for part in ("compressor", "method"):
        if (node := cfg.get(part)) is None:
            continue
        word, cls = choices.get(CHOICES[part]), get_class(node._target_)
        file = METHODS / f"{word}.yaml"  # a word without a file here is from a folder of the user's
        typed = word is not None and (not file.is_file() or get_class(OmegaConf.load(file)._target_) is cls)
        labels[part] = word if typed else label_of(cls.__name__, OmegaConf.to_container(node, resolve=True))
    return labels


def label_of(name: str, fields: Mapping[str, Any]) -> str:
    """The word of conf/method for a method with these fields, or the name of its class in lower case.

    Several words share the class Peft. They are told apart by all fields that are words or switches.

    Args:
        name: of the method's class.
    """
    files = {word: conf.load("method", word) for word in (path.stem for path in METHODS.glob("*.yaml"))}
    words = [word for word, yaml in files.items() if yaml["_target_"].rpartition(".")[2] == name]
    if len(words) > 1:
        words = [word for word in words if kind_of(files[word]) == kind_of(fields)]
    return words[0] if len(words) == 1 else name.lower()


def kind_of(fields: Mapping[str, Any]) -> dict[str, str | bool]:
    """The fields that are words or switches, and those of nested fields: {"config": "LoraConfig", "options.use_dora":
    True}."""
    flat = results.flat({key: value for key, value in fields.items() if key != "_target_"})
    return {key: value for key, value in flat.items() if isinstance(value, str | bool)}
