"""What many tests use."""

import sys
from pathlib import Path

import pytest
import yaml

from recombine.errors import UsageError

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"


QKV = ("q", "k", "v")
SPLIT = ("q", "k", "v", "o", "up", "down", "gate?")


def numbers(*tensors):
    return [t.detach().double().numpy() for t in tensors]


VBLORA = {"num_vectors": 6, "vector_length": 12, "init_vector_bank_bound": 0.3}
MIB = 2**20
ALL = ("qkv", "o", "up", "down", "gate?")


def ready(module):
    module.prepare_data()
    module.setup()
    return module


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(UsageError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def config(name: str, **overrides) -> dict:
    return yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text()) | overrides


TINY = ["model=tiny_vit", "trainer=cpu", "trainer.progress=false", "trainer.epochs=2", "data.limit=64", "probe=false"]


def before_openvino() -> None:
    """openvino imports absl, whose handler closes its stream when Hydra sets up logging: not pytest's then."""
    import absl.logging

    absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__
