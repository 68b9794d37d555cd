"""Builds methods from the configuration: from a composed node, or from the name of a YAML in conf/method."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recombine.core.method import Method
from recombine.errors import UsageError
from recombine.result_schema import MethodPart
from recombine.runtime import conf
from recombine.runtime.user_code import load_class


def from_config(cfg: DictConfig) -> Method:
    """The method that a node of the configuration describes.

    Args:
        cfg: `_target_` is the path of the class, such as recombine.methods.Crisp; the other keys are its fields.

    Raises:
        UsageError: the class lacks a field, a value has another type, or result.json uses the name of one of the
            class's fields for itself.
    """
    cls = load_class(cfg._target_, Method, "method._target_")
    if taken := MethodPart.__annotations__.keys() & OmegaConf.structured(cls).keys():
        raise UsageError(f"method._target_={cfg._target_}: result.json has {taken.pop()} already; rename that field")
    fields = {key: value for key, value in cfg.items() if key != "_target_"}
    try:
        values = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(cls), fields))
    except OmegaConfBaseException as error:
        key = error.full_key or error.key
        known = ", ".join(OmegaConf.structured(cls))
        reason = str(error).splitlines()[0]
        given = fields.get(str(key).split(".")[0], "")
        raise UsageError(f"method.{key}={given}: {reason}; {cls.__name__} takes {known}") from error
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def from_name(name: str, fields: Mapping[str, Any], key: str) -> Method:
    """The method of conf/method/<name>.yaml with other values for some of its fields.

    Args:
        name: such as lora.
        fields: the other values, by field.
        key: the key of the configuration that an error names, such as stage.reference.name.

    Raises:
        UsageError: there is no such file, or a field or value does not fit.
    """
    if (known := conf.load("method", name)) is None:
        raise UsageError(f"{key}={name}: there is no such method; take lora or full")
    return from_config(OmegaConf.create(known | dict(fields)))
