"""What is typed reaches Hydra as it was meant, or is refused in one line before anything is loaded."""

import json
import shlex
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser

import run
from helpers import CONF, TINY, refusal
from helpers.command import line
from recombine.runner import arguments, folder, grid, override_lines, quoting, typed_keys
from recombine.runtime import help


def value(override: str):
    """What Hydra reads."""
    return OverridesParser.create().parse_override(override).value()


@pytest.mark.parametrize(
    "typed",
    [
        *("/home/anna/日本", "/a/Ünïcode", "/a/my pictures (1)", "/a/[old]", "/a/it's", 'a "b"', "a=b", "x#y", "8)"),
        *("a\\b'c", "C:\\Users\\anna\\", "photos(1)", "f(x)y"),
    ],
)
def test_names_of_folders_are_what_was_typed(typed):
    read = quoting.readable(f"data.root={typed}")
    assert value(read) == typed


@pytest.mark.parametrize(
    "typed",
    [
        *("seed=0,1", "method.targets=[q,v]", "stage.reference={name: lora}", "seed=range(0,3)", "a=choice(x,[q,v])"),
        *("a='it\\'s'", 'a="日本"', "a=${seed}", "a=x y", "a=", "a=null", "+a.b=1", "~a", "optim.lr=interval(1e-4,1)"),
    ],
)
def test_what_hydra_reads_is_left_alone(typed):
    assert quoting.readable(typed) == typed


def test_each_part_of_a_sweep_is_quoted_by_itself():
    assert override_lines.values(quoting.readable("data.root=/a/日本,plain,/b c/(2)")) == [
        'data.root="/a/日本"', "data.root=plain", 'data.root="/b c/(2)"',
    ]  # fmt: skip


@pytest.mark.parametrize(
    "typed, meant",
    [
        ('"/a,b",/日本', ["/a,b", "/日本"]),
        ("/日本,'it\\'s, here',(1)", ["/日本", "it's, here", "(1)"]),
        ("[q,v],é", [["q", "v"], "é"]),
        ('"日,本",é', ["日,本", "é"]),
    ],
)
def test_commas_in_what_is_quoted_divide_nothing(typed, meant):
    read = quoting.readable(f"data.root={typed}")
    assert [value(line) for line in override_lines.values(read)] == meant


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/anna")
    for typed in ("data.root=~/x", "data.root='~/x'"):
        assert value(quoting.readable(typed)) == "/home/anna/x"
    assert value(quoting.readable("data.root=~")) == "/home/anna" and value(quoting.readable("a=b~c")) == "b~c"


@pytest.mark.parametrize(
    "typed, words",
    [
        ("seed=choice(0,1", ["still open", "seed=choice(0,1"]),
        ("method.targets=[q,v", ["still open", "'method.targets=\"[q,v\"'"]),
        ('a=[q,"v', ['cannot be read at "v', r"""'a="[q,\"v"'"""]),
        ("logger.tags=[ä]", ["cannot be read at ä", "quote each text"]),
        ("seed=chioce(0,1)", ["no function chioce", "did you mean choice?"]),
        ("method", ["say method=..."]),
        ("=3", ["say key=value"]),
        ("ä.b=1", ["say key=value"]),
    ],
)
def test_what_cannot_be_read_says_where_and_the_fix(typed, words):
    said = refusal(quoting.readable, typed)
    assert all(word in said for word in words), said


def test_flags_stand_anywhere():
    typed = ["model=tiny_vit", "-m", "seed=0,1", "--cfg", "job"]
    assert arguments.split(typed) == (["-m", "--cfg", "job"], ["model=tiny_vit", "seed=0,1"])


@pytest.mark.parametrize(
    "typed, words",
    [
        (["--banana"], ["--banana", "--hydra-help"]),
        (["--multirnu"], ["did you mean --multirun?"]),
        (["-x"], ["-x"]),
        (["--cfg"], ["--cfg", "expected one argument"]),
        (["--info=banana"], ["banana", "searchpath"]),
        (["--resolve"], ["--cfg job --resolve"]),
        (["hydra.run.dir="], ["name of a folder"]),
        (["hydra.run.dir=null"], ["hydra.run.dir=null", "name of a folder"]),
        (["hydra.run.dir=run.py"], ["run.py is not a folder"]),
        (["hydra.run.dir=."], ["the project's own folder"]),
        (["hydra.sweep.dir=/dev/null", "-m"], ["/dev/null is not a folder"]),
        (["method=null"], ["method=null", "one of", "crisp"]),
        (["method=null,crisp", "-m"], ["method=null"]),
        (["logger=5"], ["logger=5", "wandb"]),
        (["method=[a,b]"], ["one of"]),
        (["budget=null"], ["say budget=none"]),
        (["~data.limit"], ["~data.limit", "say data.limit=VALUE"]),
        (["experiment=nope"], ["experiment=nope", "crisp/tab01", "offline/crisp_tab01", "start"]),
        (["experiment=crisp"], ["crisp/tab01", "crisp/fig08"]),
        (["experiment=tab01"], ["crisp/tab01", "offline/crisp_tab01"]),
        (["experiment=crisp/tab1"], ["crisp/tab11"]),
    ],
    ids=lambda given: given[0] if "=" in given[0] or given[0][0] == "-" else "",
)
def test_what_no_run_can_be_is_refused(typed, words, monkeypatch):
    monkeypatch.chdir(help.CONF.parent)
    said = refusal(arguments.prepared, typed)
    assert all(word in said for word in words), said
    assert "experiment=tab01" not in typed or "crisp/base" not in said


def test_an_empty_slot_may_be_said():
    assert arguments.prepared(["method@compressor=null"]) == ([], ["~method@compressor"])


@pytest.mark.parametrize(
    "typed, words",
    [
        (["+optim.momentum=0.9"], ["+optim.momentum=0.9: there is no such key", "optim has name, lr"]),
        (["++trainer.epcohs=3"], ["did you mean trainer.epochs?"]),
        (["+new.key=1"], ["+new.key=1"]),
        (["+stage.bits=8"], ["stage has name"]),
        (["+hydra.launcher.jbos=2"], ["did you mean hydra.launcher.jobs?"]),
        (["+epochs=3"], ["did you mean trainer.epochs?"]),
        (["+seed.x=3"], ["seed is one value"]),
        (["+method=lora"], ["say method=lora, without +"]),
        (["method=svd,lora", "method.rnk=4"], ["method.rnk=4", "did you mean method.rank?"]),
    ],
    ids=lambda given: given[0],
)
def test_keys_that_nothing_reads_are_refused_at_every_depth(typed, words):
    said = refusal(typed_keys.refuse_unread, typed)
    assert all(word in said for word in words), said
    assert "+optim.momentum=0.9" not in said.partition(": ")[2]


def test_keys_that_something_reads_are_added():
    for typed in (["++trainer.epochs=3"], ["+method.options.use_rslora=true"], ["+model.num_classes=7"],
                  ["stage=retrofit", "+stage.bits=8"], ["stage=adapt,retrofit", "+stage.bits=8"],
                  ["method=svd,lora", "method.rank=4"], ["+data.shade=150"], ["seed=3"]):  # fmt: skip
        typed_keys.refuse_unread(typed)


def test_keys_of_a_swept_group_belong_to_its_cells():
    typed = ["method=svd,lora", "method.rank=4", "method.targets=[q,v]", "seed=0"]
    assert arguments.cell_by_cell(typed) == [
        "method=svd,lora", "method.rank=choice(4)", "method.targets=choice([q,v])", "seed=0",
    ]  # fmt: skip
    assert ("method=lora", "method.rank=4") in {cell.overrides for cell in grid.cells({}, ["method=lora"] + [
        "method.rank=choice(4)"])}  # fmt: skip


def test_hydras_advice_to_add_a_key_is_gone(capsys, monkeypatch, tmp_path):
    said = line(capsys, monkeypatch, tmp_path, "optim.momentum=0.9")
    assert "no such key" in said and "+optim" not in said
    assert "several values; as a sweep say -m" in line(capsys, monkeypatch, tmp_path, "seed=0,1")
    said = line(capsys, monkeypatch, tmp_path, "data.root='/a,b',c")
    as_list, as_text = (shlex.split(said.partition(words)[2])[0].rstrip(",") for words in ("as a list ", "as a text "))
    assert value(as_list) == ["/a,b", "c"] and value(as_text) == "'/a,b',c"
    assert "could not be converted to Integer" in line(
        capsys, monkeypatch, tmp_path, "hydra/sweeper=search", "hydra.sweeper.n_jobs=x"
    )
    assert "there is this key already; say seed=1" in line(capsys, monkeypatch, tmp_path, "+seed=1")


def test_a_run_with_names_from_life(capsys, monkeypatch, tmp_path):
    """A folder that Hydra's grammar cannot read holds the result, whose command line can be given to a shell."""
    place = tmp_path / "日本 it's (1)"
    typed = [*TINY, "stage=retrofit", "method=svd", "optim.lr=0.1", f"hydra.run.dir={place}", "method.targets=[q,v]"]
    monkeypatch.setattr(sys, "argv", ["run.py", *typed])
    assert run.cli() == 0
    said = capsys.readouterr().err.splitlines()
    assert said == ["note: not read in this run (stage=retrofit, no sweep): trainer.epochs=2 probe=false optim.lr=0.1"]
    result = json.loads((place / "result.json").read_text())
    again = shlex.split(result["command"])[2:]
    assert set(again) == {override for override in typed if not override.startswith("hydra.")}


@pytest.mark.parametrize("typed, named", [(["experiment=start"], "start"), (["method=lora"], None)])
def test_a_single_run_of_an_experiment_is_of_its_group(typed, named, monkeypatch):
    """The dashboard of the experiment shows what has its name."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", typed, return_hydra_config=True)
    cfg.hydra.runtime.output_dir = "here"
    monkeypatch.setattr(HydraConfig.instance(), "cfg", cfg)
    assert folder.group(Path("here")) == named
