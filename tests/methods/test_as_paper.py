"""`as_paper`: a method's form as its paper has it, in one field, as far as its fields have their defaults."""

from dataclasses import fields

import pytest

import recombine
from recombine import Balf, Crisp, Recast, Svft
from recombine.core.method import method_classes
from recombine.methods.from_config import from_name
from recombine.runtime import open_fields
from zoo import build, losses

PAPERS = {name: cls for name, cls in method_classes().items() if cls.paper and cls.__module__.startswith("recombine.")}


@pytest.mark.parametrize("name", PAPERS)
def test_it_sets_what_differs(name):
    cls = PAPERS[name]
    method = cls(as_paper=True).settled("none", calibrates=True)
    plain = cls().settled("none", calibrates=True)
    for key, value in cls.paper.items():
        groups = value.items() if isinstance(value, dict) else [(None, value)]
        for part, wanted in groups:
            here = getattr(method, key)
            assert (here if part is None else getattr(here, part)) == wanted
    changed = {f.name for f in fields(cls) if getattr(method, f.name) != getattr(plain, f.name)} - {"as_paper"}
    assert changed and changed <= cls.paper.keys()


@pytest.mark.parametrize("name", ["balf", "isomorphic", "jactus", "kfac_svd", "pc_lora", "prunenet", "ssf", "svft"])
def test_the_paper_s_form_runs(name):
    model = build("tiny_vit")
    recombine.apply(model, from_name(name, {"as_paper": True}, "method"), losses=losses(model))
    assert model.recombined.steps[0].fields["as_paper"]


def test_what_is_typed_wins():
    assert Svft(as_paper=True, start="zero", pattern="random").settled("none", True).pattern == "random"
    assert Crisp(as_paper=True, chunk=16).settled("none", True).chunk == 16
    assert Crisp(as_paper=True, fit="random").settled("retained", True).fit == "random"


def test_open_fields_of_crisp_follow_the_budget():
    told = {
        kind: Crisp().settled(kind, True) for kind in ("none", "trainable", "retained", "bytes", "energy", "memory")
    }
    for kind, method in told.items():
        small = kind not in ("none", "trainable")
        assert {key: getattr(method, key) for key in open_fields.OPEN[small]} == open_fields.OPEN[small], kind
    assert Crisp().settled("retained", calibrates=False).fit == "closed"
    paper = [Crisp(as_paper=True).settled(kind, True) for kind in ("none", "retained")]
    assert [(m.chunk, m.group_size, m.fit) for m in paper] == [(32, 2, "mimicry"), (32, 2, "closed")]
    assert Recast().settled("retained", True) == Recast() and Balf().settled("retained", True) == Balf()


def test_configurations_compare_by_what_open_fields_stand_for():
    crisp = {"_target_": "recombine.Crisp", "chunk": None, "group_size": None, "fit": None}
    lora = {"_target_": "recombine.Peft"}

    def fits(**config):
        keys = recombine.results.canonical(config)
        return [keys[key] for key in ("method.fit", "compressor.fit") if key in keys]

    assert fits(method=crisp, budget="none") == ["closed"] and fits(method=crisp, budget="retained_50") == ["aware"]
    assert fits(method=lora, compressor=crisp, budget="bytes_50") == ["aware"]
    assert fits(method=crisp, compressor={"_target_": "recombine.Svd"}, budget="retained_50") == ["closed"]
