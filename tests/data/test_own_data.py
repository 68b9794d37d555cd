"""Data sets by name: the package's own, and a class of the user's own from the command line's form to result.json."""

import itertools
import json

import pytest
from hydra import compose, initialize_config_dir

from helpers import CONF, ROOT, refusal
from recombine import data, models
from recombine.data import base
from recombine.runner import ranks

OWN = '''
"""Bright and dark squares."""

import numpy as np

from recombine.data.vision.base import VisionData
from recombine.data.vision.source import Lazy, Source


class Squares(VisionData):
    """shade: of the bright ones."""

    name = "squares"

    def __init__(self, *, shade: int = 200, **kwargs):
        super().__init__(**kwargs)
        self.shade = shade

    def identity(self):
        return f"squares {self.shade}"

    def source(self):
        labels, first = np.arange(24) % 2, {"train": 0, "val": 24, "test": 48}
        draw = lambda i: np.full((8, 8), self.shade * (i % 2) + i // 2, np.uint8)
        splits = {split: (Lazy(draw, range(start, start + 24)), labels) for split, start in first.items()}
        return Source(["dark", "bright"], "none", splits)


class Nameless(VisionData):
    pass


number = 3
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module in the working directory, of a name that no other test imports."""
    name = f"own_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in __import__("sys").path if path])
    monkeypatch.setenv("RECOMBINE_CACHE", str(tmp_path / "cache"))
    return name


def test_a_class_of_the_users_own_runs_to_a_result(own, tmp_path):
    said = ["model=tiny_vit", f"data.name={own}.Squares", "data.task=null", "+data.shade=150", "method=lora"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [*said, "trainer=cpu", "trainer.epochs=1", "trainer.progress=false"])
    ranks.main(cfg, tmp_path / "out")
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["data"]["name"] == "squares" and result["data"]["sizes"] == {"train": 24, "val": 24, "test": 24}
    assert result["config"]["data"]["name"] == f"{own}.Squares" and result["linear_probe"]["test"] > 0.9


def test_what_is_wrong_with_a_class_of_ones_own_is_one_line(own, tmp_path):
    assert data.build(f"{own}.Squares", task=None).title == "squares" and data.suite(f"{own}.Squares") == {}
    assert f"has no Circles: name a subclass of {base.__name__}.DataModule" in refusal(data.find, f"{own}.Circles")
    assert "has another kind of number" in refusal(data.find, f"{own}.number")
    assert "write name = ..." in refusal(data.find, f"{own}.Nameless")
    assert "importing nowhere in" in (said := refusal(data.find, "nowhere.Data")) and "ModuleNotFoundError" in said
    (tmp_path / f"torn_{own}.py").write_text("import recombine\nraise ValueError('not\\nready')\n")
    assert "fails (ValueError: not): correct it" in refusal(data.find, f"torn_{own}.Data")
    known = refusal(data.build, f"{own}.Squares", task=None, shad=1)
    assert "data.shad=1" in known and "data has task, image_size" in known


@pytest.mark.parametrize("name", data.known_classes())
def test_the_packages_own_are_found_and_have_a_yaml(name):
    cls = data.find(name)
    assert cls.name == name and issubclass(cls, base.DataModule) and (ROOT / "conf/data" / f"{name}.yaml").is_file()
    assert set(cls.suite) <= set(cls.task_labels) or not cls.task_labels or name == "sentences"
    if cls.experiment:
        assert (ROOT / "conf/experiment" / f"{cls.experiment}.yaml").is_file() and cls.suite


def test_every_yaml_of_the_data_is_of_a_class():
    choices = {path.stem for path in (CONF / "data").glob("*.yaml") if not path.name.startswith("_")}
    assert choices <= set(data.known_classes())


def test_titles_are_words(tmp_path):
    for split, kind in itertools.product(("train", "test"), ("ant", "bee")):
        for i in range(20):
            path = tmp_path / "photos" / split / kind / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    assert data.build("folder", root=tmp_path / "photos").title == "photos (folder)"
    assert data.build("folder", root=tmp_path, task="photos").title == "photos (folder)"
    titles = [
        ("vtab", "cifar"),
        ("offline", "dsprites_loc"),
        ("glue", "stsb"),
        ("imagenet", "imagenet"),
        ("text", "wiki"),
    ]
    assert [data.build(name, task=task).title for name, task in titles] == [
        "VTAB-1K CIFAR-100", "offline dsprites_loc", "GLUE STS-B", "ImageNet-1K (2 %)", "Wikipedia summaries",
    ]  # fmt: skip


def test_a_suites_default_task_is_said_once_where_it_was_not_chosen(capsys):
    base.log_once.cache_clear()
    for overrides in (["data=vtab"], ["data=vtab"]):
        data.say_default_task("vtab", "cifar", overrides)
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and "one of its 19 tasks runs, cifar (CIFAR-100)" in said
    assert "data.task=all" in said and "experiment=crisp/tab01" in said
    base.log_once.cache_clear()
    for name, overrides in (("vtab", ["data.task=cifar"]), ("vtab", ["experiment=crisp/tab01"]), ("offline", [])):
        data.say_default_task(name, "cifar", overrides)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("library, arch, name, refused", [
    ("timm", "vit", "sentences", "sees pictures, not text: take model=minilm, or data=offline"),
    ("transformers", "bert", "offline", "reads text: take data=sentences"),
    ("transformers", "llama", "offline", "reads text: take data=text"),
    ("transformers", "llama", "sentences", "is no task for model m: take model=minilm"),
    ("transformers", "bert", "text", "is no task for model m: take model=smollm2_135m"),
])  # fmt: skip
def test_a_model_that_cannot_read_the_data_is_refused(library, arch, name, refused):
    task = {"sentences": "sentiment", "offline": "emoji", "text": "wiki"}[name]
    source = {"name": "m", "library": library, "arch": arch}
    assert refused in refusal(data.build(name, task=task).attach_model, **models.for_data(source))
