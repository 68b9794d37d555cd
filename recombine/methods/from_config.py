"""Builds methods from the configuration: from a composed node, or from the name of a YAML in conf/method."""

from collections.abc import Mapping
from typing import Any

from recombine.core.method import Method
from recombine.errors import UsageError
from recombine.result_schema import MethodPart
from recombine.runtime import conf
from recombine.runtime.schema import annotations, typed
from recombine.runtime.user_code import load_class


def from_config(cfg: Mapping[str, Any], key: str = "method") -> Method:
    """The method that a node of the configuration describes.

    Args:
        cfg: `_target_` is the path of the class, such as recombine.methods.Crisp; the other keys are its fields.
        key: of the node: method, compressor or stage.reference.

    Raises:
        UsageError: the class lacks a field, a value has another type, or result.json uses the name of one of the
            class's fields for itself.
    """
    cls = load_class(cfg.get("_target_"), Method, f"{key}._target_")
    if taken := MethodPart.__annotations__.keys() & annotations(cls).keys():
        raise UsageError(f"{key}._target_={cfg['_target_']}: result.json has {taken.pop()} already; rename that field")
    method = typed(cls, {name: value for name, value in cfg.items() if name != "_target_"}, key)
    method.key = key
    return method


def from_name(name: str, fields: Mapping[str, Any], key: str) -> Method:
    """The method of conf/method/<name>.yaml with other values for some of its fields.

    Args:
        name: such as lora.
        fields: the other values, by field.
        key: the node of the configuration that an error names, such as stage.reference.

    Raises:
        UsageError: there is no such file, or a field or value does not fit.
    """
    if (known := conf.load("method", name)) is None:
        raise UsageError(f"{key}.name={name}: there is no such method; take lora or full")
    return from_config(known | dict(fields), key)
