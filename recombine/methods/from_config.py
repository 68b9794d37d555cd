"""Methods out of configurations: a composed node, or the name of a YAML in conf/method."""

from collections.abc import Mapping
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recombine.core.method import Method
from recombine.errors import UsageError
from recombine.result_schema import MethodPart
from recombine.runtime.clone import CONF


def from_config(cfg: DictConfig) -> Method:
    """The method that a node of the configuration describes: `_target_`, its class, and the class's fields.

    Raises:
        UsageError: a field that the class does not have, a value of another type, or a class with a field that
            result.json needs for itself.
    """
    cls = get_class(cfg._target_)
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
        key: of the configuration, which an error names: stage.reference.name.

    Raises:
        UsageError: there is no such file.
    """
    file = CONF / "method" / f"{name}.yaml"
    if not file.is_file():
        raise UsageError(f"{key}={name}: there is no such method; take lora or full")
    return from_config(OmegaConf.create({**OmegaConf.to_container(OmegaConf.load(file)), **fields}))
