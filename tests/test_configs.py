"""Every YAML under conf composes, and every method's YAML is a method."""

from dataclasses import fields
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import recombine.runtime.naming  # noqa: F401  resolvers that the configuration uses
from recombine import models
from recombine.core.budget import Budget
from recombine.core.method import Method
from recombine.methods.from_config import from_config
from recombine.stages import STAGES

CONF = Path(__file__).parents[1] / "conf"
CHOICES = [(p.parent.name, p.stem) for p in sorted(CONF.glob("*/*.yaml"))]
CHOICES += [("experiment", f"{p.parent.name}/{p.stem}") for p in sorted(CONF.glob("experiment/*/*.yaml"))]


@pytest.mark.parametrize("group, choice", CHOICES, ids=[f"{g}={c}" for g, c in CHOICES])
def test_composes(group, choice):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [f"{group}={choice}"])
    missing = OmegaConf.missing_keys(cfg)
    assert missing <= {"budget.value", "stage.checkpoint", "data.root"}
    if group == "method":
        method = from_config(cfg.method)
        assert isinstance(method, Method) and set(cfg.method) - {"_target_"} == {f.name for f in fields(method)}
    if group == "budget" and not missing:
        assert str(Budget(cfg.budget.kind, cfg.budget.value)) == choice
    if group == "stage":
        assert cfg.stage.name == choice and choice in STAGES
    if group == "model":
        assert cfg.model.name == choice and choice in models.list_models()
    if group == "experiment":  # wins over the defaults, and the command line over it
        with initialize_config_dir(str(CONF), version_base="1.3"):
            assert compose("config", [f"{group}={choice}", "seed=5"]).seed == 5
            assert compose("config", [f"{group}={choice}"]) != compose("config", [])
    if group == "data":
        assert cfg.data.name == choice


@pytest.mark.parametrize("word, kind, value", [
    ("retained_50", "retained", 0.5), ("trainable_150k", "trainable", 150e3), ("trainable_2m", "trainable", 2e6),
    ("energy_99.5", "energy", 0.995), ("memory_1200mb", "memory", 1200.0), ("none", "none", None),
])  # fmt: skip
def test_budget_words(word, kind, value):
    budget = Budget.parse(word)
    assert budget.kind == kind and (budget.value is None or budget.value == pytest.approx(value))
