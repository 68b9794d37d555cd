"""The schema: every key of conf/ is in it, and a value that does not fit is one line with its own key."""

import math
from dataclasses import dataclass, field
from typing import Literal

import pytest

from helpers import CONF
from recombine import data, models
from recombine.core.method import Method
from recombine.errors import UsageError
from recombine.runner import config
from recombine.runtime import conf
from recombine.runtime.kinds import Count, Deviations, Rate, Share, Whole, Word
from recombine.runtime.schema import annotations, checked, typed
from recombine.runtime.user_code import load_class


@dataclass(frozen=True, kw_only=True)
class Inner:
    share: Share = 0.5
    words: tuple[str, ...] = ()

    def contradiction(self, key: str) -> str | None:
        return f"{key}.share=1 leaves no words" if self.share == 1 and self.words else None


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: Literal["adamw", "sgd"] = "adamw"
    lr: Rate | None = None
    steps: Count = 1
    flag: bool = True
    devices: Count | Literal["auto"] | list[Whole] = 1
    std: Deviations | None = None
    task: Word = ""
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"name": "adamv"}, "node.name=adamv: must be one of adamw, sgd (did you mean adamw?)"),
        ({"lr": -1}, "node.lr=-1: must be a number from 0 to 1000, or null"),
        ({"lr": True}, "node.lr=true: must be a number"),
        ({"lr": "fast"}, "node.lr=fast: must be a number"),
        ({"lr": 1e30}, "node.lr=1e+30: must be a number from 0 to 1000"),
        ({"lr": math.inf}, "node.lr=inf: must be a finite number"),
        ({"lr": math.nan}, "node.lr=nan: must be a finite number"),
        ({"lr": 10**400}, "node.lr=10000000000000000000...: must be a finite number"),
        ({"steps": 0}, "node.steps=0: must be a whole number from 1"),
        ({"steps": 2.0}, "node.steps=2.0: must be a whole number"),
        ({"steps": 2**31}, "node.steps=2147483648: must be a whole number from 1 to 2147483647"),
        ({"flag": 1}, "node.flag=1: must be true or false"),
        ({"devices": [0, "a"]}, "node.devices=[0,a]: must be a whole number from 1, one of auto"),
        ({"std": [1, 0, 1]}, "node.std=[1,0,1]: must be three numbers above 0, one of each colour, or null"),
        ({"std": 0.5}, "node.std=0.5: must be three numbers above 0"),
        ({"task": ["a"]}, "node.task=[a]: must be a word"),
        ({"inner": {"share": 2}}, "node.inner.share=2: must be a number from 0 to 1"),
        ({"inner": {"words": "a"}}, "node.inner.words=a: must be a list of words; say node.inner.words=[a]"),
        ({"inner": {"words": [math.inf]}}, "node.inner.words=inf"),
        ({"inner": {"share": 1, "words": ["a"]}}, "node.inner.share=1 leaves no words"),
        ({"inner": 5}, "node.inner=5: must be a group of keys"),
        ({"stps": 1}, "node.stps=1: there is no such key; did you mean steps? node has name, lr"),
    ],
)
def test_what_does_not_fit_is_one_line(values, words):
    with pytest.raises(UsageError) as error:
        typed(Outer, values, "node")
    assert words.replace("one of auto", "auto") in str(error.value) and "\n" not in str(error.value)


def test_values_come_out_in_the_kinds_that_are_asked_for():
    made = typed(Outer, {"lr": 1, "devices": [0, 1], "task": 80, "inner": {"words": ["a"]}, "std": [1, 2, 3]}, "node")
    assert made == Outer(lr=1.0, devices=[0, 1], task="80", inner=Inner(words=("a",)), std=(1.0, 2.0, 3.0))
    assert type(made.lr) is float


def test_arguments_of_functions_and_of_bases_are_schemas():
    class Base:
        def __init__(self, *, size: Count, **rest):
            pass

    class Middle(Base):
        def __init__(self, *, share: Share = 0.5, **kwargs):
            pass

    class Closed(Middle):
        def __init__(self, *, word: Word):
            pass

    assert set(annotations(Middle)) == {"share", "size"} and set(annotations(Closed)) == {"word"}
    assert checked(Middle, {"size": 3}, "data") == {"size": 3}
    with pytest.raises(UsageError, match="data.size: needs a value: say data.size=..."):
        checked(Middle, {"share": 1}, "data")


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("[!_]*.yaml"))


@pytest.mark.parametrize("group", ["optim", "trainer", "logger", "stage", "method", "data", "model"])
def test_every_key_of_conf_is_in_the_schema(group):
    for name in choices(group):
        values = conf.load(group, name)
        if group == "method":
            target = load_class(values.pop("_target_"), Method, "method._target_")
        elif group == "data":
            target = data.find(values.pop("name"))
        elif group == "stage":
            target = config.stage_schema(values["name"])
        elif group == "model":
            models.check(**values)
            continue
        else:
            target = config.NODES[group]
        assert not values.keys() - annotations(target).keys(), name


def test_every_key_at_the_top_is_in_the_schema():
    whole = conf.load("", "config")
    nodes = {key for key in whole if isinstance(whole[key], dict)} - {"hydra"}
    assert whole.keys() - nodes - {"hydra"} == annotations(config.RootKeys).keys()
    apart = {"calibration": {"data"}, "analyse": {"elsewhere"}}  # names of data and of tasks, which the data know
    for node in nodes:
        assert whole[node].keys() - apart.get(node, set()) == annotations(config.NODES[node]).keys()
