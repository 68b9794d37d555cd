"""docs/extending.md, performed: its blocks are written into a copy of the project and run through the command line."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import recombine
from helpers import ROOT, refusal
from recombine import Layout
from recombine.models import lookup, roles

PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = {  # what stands behind a fence -> its text, less the fence's indent
    match[3]: re.sub(rf"(?m)^{match[1]}", "", match[4])
    for match in re.finditer(r"(?ms)^( *)```(python|yaml) ([^\n]+)\n(.*?)^\1```$", PAGE)
}
SHORT = ["trainer=cpu", "trainer.progress=false", "trainer.epochs=1", "probe=false"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of what a clone has, without results and pages."""
    copy = tmp_path_factory.mktemp("clone") / "project"
    ignored = shutil.ignore_patterns("__pycache__", "offline", "*.svg")
    for folder in ("recombine", "conf", "hydra_plugins", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for file in ("run.py", "pyproject.toml"):
        shutil.copy(ROOT / file, copy)
    return copy


def write(clone: Path, *names: str) -> None:
    """Writes the blocks that are whole files, each where its name says."""
    for name in names:
        assert not (clone / name).exists()
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text(BLOCKS[name])


def insert(path: Path, before: str, text: str) -> None:
    """Writes text in front of a line that is there once."""
    whole = path.read_text()
    assert whole.count(before) == 1
    path.write_text(whole.replace(before, f"{text}{before}"))


def command(folder: Path, *arguments, cwd: Path | None = None) -> str:
    """Runs Python in the copy; its output."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd or folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def execute(clone: Path, out: Path, *overrides: str, cwd: Path | None = None) -> dict:
    """One run of the copy's run.py; its result.json."""
    out.mkdir(parents=True)
    shown = command(clone, clone / "run.py", *overrides, *SHORT, f"hydra.run.dir={out}", cwd=cwd)
    result = json.loads((out / "result.json").read_text())
    assert result["command"] in shown  # the last table was printed
    return result


def test_every_block_has_a_name():
    assert len(BLOCKS) == PAGE.count("```") // 2 >= 11


def test_a_method_takes_three_places(clone, tmp_path):
    write(clone, "recombine/methods/halved.py", "conf/method/halved.yaml")
    matrix = clone / "tests" / "helpers" / "rows.py"
    text = matrix.read_text()
    assert text.count("from recombine import (") == text.count("\nROWS = {\n") == 1
    text = text.replace("\nROWS = {\n", "\nROWS = {\n    " + BLOCKS["row of the contract matrix"])
    matrix.write_text(text.replace("from recombine import (", "from recombine import (\n    Halved,"))
    contract = clone / "tests" / "methods" / "test_contract.py"
    rows = command(clone, "-m", "pytest", "-q", "-p", "no:cacheprovider", contract, "-k", "test_contract and halved")
    assert "4 passed" in rows  # one a family
    result = execute(clone, tmp_path / "out", "method=halved", "model=tiny_vit", "data.limit=32")
    assert result["method"]["label"] == "halved" and result["method"]["name"] == "Halved"
    assert result["account"]["trained_without_head"] == 2 * 4 * (3 * 48 + 48 + 192 + 48)


def test_a_method_of_the_users_own_module(clone, tmp_path):
    mine = tmp_path / "mine"
    (mine / "my_conf" / "method").mkdir(parents=True)
    (mine / "my_methods.py").write_text(BLOCKS["recombine/methods/halved.py"].replace("Halved", "Mine"))
    config = BLOCKS["my_conf/method/mine.yaml"].replace("Halved", "Mine")
    (mine / "my_conf" / "method" / "mine.yaml").write_text(config)
    said = ["--config-dir", "my_conf", "method=mine", "model=tiny_vit", "data.limit=32"]
    result = execute(clone, tmp_path / "out", *said, cwd=mine)
    assert result["method"]["label"] == "mine" and result["method"]["name"] == "Mine" and result["test"]["acc"] >= 0


def test_a_family_is_one_object(monkeypatch):
    monkeypatch.setattr(lookup, "REGISTERED", [])
    told = {}
    exec(BLOCKS["my_family.py"], told)
    model, x = told["Net"](), told["x"]
    assert roles.family(model) is lookup.REGISTERED[0] and type(told["model"].stack[0].mixed) is nn.Linear
    roles.split_fused(model, ("q",))
    q, k, v = told["model"].stack[0].mixed(x).unflatten(-1, (2, -1)).chunk(3, dim=-1)
    roles.split_fused(told["model"], ("q",))
    parts = told["model"].stack[0].mixed
    for part, expected in zip("qkv", (q, k, v), strict=True):
        torch.testing.assert_close(getattr(parts, part)(x), expected.flatten(2))
    assert roles.head(model) is model.top and len(roles.blocks(model)) == 3


@pytest.mark.parametrize(
    "wrong", [Layout(2, (16, 16, 8)), Layout(5, (6, 6, 7)), Layout(1, (48, 48)), (1, (32,) * 3), None]
)
def test_a_wrong_layout_is_one_line(monkeypatch, wrong):
    monkeypatch.setattr(lookup, "REGISTERED", [])
    told = {}
    exec(BLOCKS["my_family.py"], told)
    monkeypatch.setattr(lookup, "REGISTERED", [replace(lookup.REGISTERED[0], layout=lambda holder, fused: wrong)])
    model = told["Net"]()
    line = refusal(recombine.apply, model, recombine.Svd(targets=("q", "v")), "retained_50")
    assert "Family.layout gives" in line and "which has 96 outputs" in line
    assert type(model.stack[0].mixed) is nn.Linear


def test_a_wrong_family_is_one_line():
    row = recombine.Family(classes="Net", roles={"o": "x"}, blocks="y")
    assert "Family.roles=['o']: give a dict" in refusal(recombine.register, replace(row, roles=["o"]))
    assert "give a function" in refusal(recombine.register, replace(row, layout=Layout(1, (1, 1, 1))))


def test_a_model_is_a_yaml(clone, tmp_path):
    write(clone, "conf/model/tiny_eva.yaml")
    said = ["model=tiny_eva", "data.limit=32", "method=cersa", "method.targets=[q,k,v,o,gate,up,down]"]
    result = execute(clone, tmp_path / "out", *said)
    assert [row["role"] for row in result["layers"]] == ["q", "k", "v", "o", "gate", "up", "down"] * 2
    assert result["model"]["arch"].startswith("eva02") and result["account"]["retained"] > 0


def test_a_data_set_is_a_class_and_a_yaml(clone, tmp_path):
    write(clone, "recombine/data/vision/stripes.py", "conf/data/stripes.yaml")
    result = execute(clone, tmp_path / "out", "data=stripes", "model=tiny_vit", "method=lora", "trainer.epochs=2")
    assert result["data"]["name"] == "stripes" and result["data"]["sizes"] == {"train": 64, "val": 32, "test": 32}
    assert result["data"]["title"] == "stripes" and 0 <= result["test"]["acc"] <= 1


def test_a_stage_is_a_function_and_a_line(clone, tmp_path):
    write(clone, "recombine/stages/norms.py", "conf/stage/norms.yaml")
    stages = clone / "recombine" / "stages" / "__init__.py"
    insert(stages, "from recombine.stages.profile import", BLOCKS["line of STAGES"])
    text = stages.read_text()
    assert text.count("profile)}") == 1
    stages.write_text(text.replace("profile)}", "profile, norms)}"))
    result = execute(clone, tmp_path / "out", "stage=norms", "model=tiny_vit", "method=svd", "data.limit=32")
    assert result["stage"] == "norms" and result["logit_scale"] > 0
