"""Every YAML under conf composes, and every method's YAML is a method."""

from dataclasses import fields
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import recombine.runtime.naming  # noqa: F401  resolvers that the configuration uses
from helpers import CONF
from recombine import models, results
from recombine.core.budget import Budget
from recombine.core.method import Method
from recombine.methods.from_config import from_config
from recombine.stages import STAGES
from recombine.training import resume

CHOICES = [(p.parent.name, p.stem) for p in sorted(CONF.glob("*/*.yaml")) if p.stem[0] != "_"]
CHOICES = [(group, choice) for group, choice in CHOICES if group != "shared"]  # parts of experiments
CHOICES += [("experiment", f"{p.parent.name}/{p.stem}") for p in sorted(CONF.glob("experiment/*/*.yaml"))]


@pytest.mark.parametrize("group, choice", CHOICES, ids=[f"{g}={c}" for g, c in CHOICES])
def test_composes(group, choice):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [f"{group}={choice}"])
    missing = OmegaConf.missing_keys(cfg)
    assert missing <= {"stage.checkpoint", "data.root", "data.task"}
    if group == "method":
        method = from_config(cfg.method)
        assert isinstance(method, Method) and set(cfg.method) - {"_target_"} == {f.name for f in fields(method)}
    if group == "stage":
        assert cfg.stage.name == choice and choice in {*STAGES, "plan"}  # which stands beside one of them
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
    ("energy_99.5", "energy", 0.995), ("memory_1200mb", "memory", 1200), ("none", "none", None),
    ("retained_37.7", "retained", 0.377), ("trainable_80k", "trainable", 80e3),
])  # fmt: skip
def test_budget_words(word, kind, value):
    budget = Budget.parse(word)
    assert (budget.kind, budget.value, str(budget)) == (kind, value, word.replace("_2m", "_2000k"))


OLD = {  # overrides -> the state folder that version 0c7662e gave them, where the budget was two keys
    ("method.lr=5e-3",): "766176df9903b331",  # once the default
    ("budget=retained_50", "method=svd", "stage=joint"): "ce3c98e3881a083f",
    ("budget=trainable_150k", "method=lora"): "7d6c5c804969f1d2",
    ("budget=energy_95", "method=svd"): "1fc1ad4c8cbc4d43",
    ("budget=memory_1200mb", "method=cersa", "data=vtab"): "494ac1bccd1acc90",
    ("budget=retained_37", "method=recast"): "aa6971405ac59800",
    ("method=lora", "data=glue", "model=minilm"): "b22ef4b9007240d5",
    ("experiment=crisp/tab02_lower", "method@compressor=isomorphic", "method=lora"): "aec3132a34184478",
    ("experiment=offline/llama", "method=jactus"): "ca50a6204089708e",
    ("experiment=cersa/tab09", "data.task=cars", "method=svft"): "9ff3c353d60a5f4e",
}


@pytest.mark.parametrize("overrides, digest", OLD.items(), ids=[" ".join(key) or "default" for key in OLD])
def test_a_run_finds_the_state_that_an_older_version_left(overrides, digest):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert resume.state_folder(Path("run"), results.settings(compose("config", [*overrides]))).name == digest


def test_an_older_result_compares_equal():
    new = {"budget": "retained_37", "optim": {"name": "adamw", "lr": 0.1}}
    old = {"budget": {"kind": "retained", "value": 0.37}, "optim": {"lr": 0.1}}
    assert results.canonical(new) == results.canonical(old) == {
        "budget.kind": "retained", "budget.value": 0.37, "optim.lr": 0.1,
    }  # fmt: skip
    assert results.config_difference(old, new) is None
    assert results.config_difference(old, new | {"budget": "none"}) is not None
    assert "optim.name" in results.canonical({"optim": {"name": "sgd"}})
