"""Short runs on a tiny ViT, in this process."""

import json
import sys

from hydra import compose, initialize_config_dir

import run
from helpers import CONF, TINY
from recombine.runner import ranks

CHUNK = "method.chunk=16"


def config(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", [*TINY, *overrides])


def execute(folder, *overrides) -> dict:
    ranks.main(config(*overrides), folder)
    return json.loads((folder / "result.json").read_text())


def line(capsys, monkeypatch, tmp_path, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["run.py", f"hydra.run.dir={tmp_path}/out", *TINY, *arguments])
    monkeypatch.setattr(run, "DEBUG", False)
    assert run.cli() == 2
    told = [text for text in capsys.readouterr().err.splitlines() if text.strip() and "img/s" not in text]
    err = [text for text in told if not text.startswith("note: ")]  # said before the run got so far
    assert len(err) == 1 and err[0].startswith("run.py: "), err
    assert not (tmp_path / "out" / "result.json").exists()
    return err[0]
