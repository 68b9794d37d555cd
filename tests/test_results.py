"""result.json: which configurations differ, and scores that are no number."""

import hashlib
import inspect
import json
import math
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, get_args, get_origin, get_type_hints, is_typeddict

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import recombine
import run
from helpers import CONF, ROOT
from recombine import result_schema, results
from recombine.errors import UsageError
from recombine.report import records, table_data
from recombine.result_schema import Result
from recombine.runner import labels, pipeline, ranks, summary
from recombine.runtime.later import LATER
from scripts import make_docs

TINY = ["trainer=cpu", "trainer.progress=false", "trainer.epochs=1", "data.limit=32", "calibration.samples=32"]
VIT, LANGUAGE = ["model=tiny_vit", *TINY], ["model=tiny_llama", "data=text", "data.max_length=32", "data.limit=8"]
RUNS = {
    "adapt": [
        *VIT,
        "method=lora",
        "probe=false",
        "analyse.subspaces=0.9",
        "analyse.maps=4",
        "analyse.elsewhere=[emoji]",
    ],
    "pair": [*VIT, "method@compressor=svd_llm", "method=lora", "stage=joint", "budget=retained_50"],
    "compress": [*VIT, "method=crisp", "method.chunk=16", "stage=compress", "budget=retained_50", "probe=false"],
    "retrofit": [*VIT, "method=cersa", "stage=retrofit"],
    "profile": [*VIT, "method=svft", "stage=profile", "stage.rounds=1"],
    "closed form": [*VIT, "method=svd", "stage=profile", "stage.rewrite=false"],
    "sentences": [*TINY, "model=tiny_bert", "data=sentences", "method=ia3"],
    "language": [*TINY, *LANGUAGE, "method=cersa", "data@calibration.data=text", "calibration.data.limit=8"],
}


def execute(folder: Path, *overrides: str) -> dict:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        ranks.main(compose("config", overrides), folder)
    return json.loads((folder / "result.json").read_text())


def wrong(value, hint, path: str = "result", old: bool = False) -> list[str]:
    """Where a value of a result.json is not what its type says. old: of a version that lacked some keys."""
    if is_typeddict(hint):
        if not isinstance(value, dict):
            return [f"{path}: {value!r} is no {hint.__name__}"]
        hints = get_type_hints(hint)
        missing = set() if old else hint.__required_keys__ - value.keys()
        unknown = set() if hint in result_schema.OPEN else value.keys() - hints.keys()
        inner = [wrong(value[key], hints[key], f"{path}.{key}", old) for key in hints if key in value]
        return [f"{path}: {key} is missing or unknown" for key in missing | unknown] + sum(inner, [])
    origin, inner = get_origin(hint), get_args(hint)
    if origin is types.UnionType:
        tried = [wrong(value, one, path, old) for one in inner]
        return [] if [] in tried else min(tried, key=len)
    if origin in (dict, list) and isinstance(value, origin):
        pairs = value.items() if origin is dict else enumerate(value)
        return sum([wrong(one, inner[-1], f"{path}.{key}", old) for key, one in pairs], [])
    kinds = (int, float) if hint is float else (origin or hint,)
    fits = isinstance(value, kinds) and (hint is bool or not isinstance(value, bool))
    return [] if fits else [f"{path}: {value!r} is no {hint}"]


def test_the_validator_sees_what_is_wrong():
    good = {"val": 0.5, "test": None, "decay": 1}
    assert wrong(good, result_schema.Probe) == []
    assert wrong(good | {"val": "high"}, result_schema.Probe) and wrong(good | {"val": True}, result_schema.Probe)
    assert wrong(good | {"more": 1}, result_schema.Probe) and wrong({"val": 0.5}, result_schema.Probe)
    assert not wrong({"val": 0.5}, result_schema.Probe, old=True) and wrong({"val": "x"}, result_schema.Probe, old=True)
    assert wrong({"a": [0.5, "x"]}, result_schema.Curves) and wrong(None, dict[str, int])


@pytest.mark.parametrize("name", RUNS)
def test_a_result_has_the_keys_and_types_of_the_schema(name, tmp_path, monkeypatch):
    """And each key comes from a part that the schema names."""
    parts = []

    def spy(**who):
        parts.append(who)
        return merge(**who)

    merge = results.merge_parts
    monkeypatch.setattr(results, "merge_parts", spy)
    result = execute(tmp_path, *RUNS[name])
    assert wrong(result, Result) == []
    (whole,) = [who for who in parts if "analysis" in who]
    writers = {key: writer for writer, part in whole.items() for key in part}
    facts = {key: hint.__metadata__[0] for key, hint in get_type_hints(Result, include_extras=True).items()}
    for key in result:
        assert writers.get(key, "runner") in facts[key].by, key
    if name == "adapt":
        assert result["subspaces"]["map_u"] and result["elsewhere"]["after"].keys() == {"emoji"}


def test_every_key_is_explained_and_has_a_writer():
    for _, part in inspect.getmembers(result_schema, is_typeddict):
        facts = [hint.__metadata__[0] for hint in get_type_hints(part, include_extras=True).values()]
        assert part.__doc__ and all(fact.meaning for fact in facts), part
    for key, hint in get_type_hints(Result, include_extras=True).items():
        writers = hint.__metadata__[0].by
        assert writers and set(writers) <= {*pipeline.STAGES, "analysis", "runner"}, key


@pytest.mark.parametrize("path", sorted(ROOT.glob("experiments/**/runs.jsonl")), ids=lambda path: path.parent.name)
def test_committed_records_of_older_versions_fit(path):
    """A record is a result without its configuration, with shorter layers (recombine/report/records.py)."""
    for line in path.read_text().splitlines():
        record = json.loads(line)
        assert {"cell", "layers", "config"} <= record.keys()
        cut = {key: value for key, value in record.items() if key not in ("cell", "layers", "config")}
        assert wrong(cut, Result, old=True) == []
        assert summary.summary_table(cut, path).startswith(summary.heading(cut))


def test_a_key_that_two_parts_write_names_both():
    assert results.merge_parts(runner={"a": 1}, adapt={"b": 2}) == {"a": 1, "b": 2}
    with pytest.raises(AssertionError, match="val is written by adapt and by analysis"):
        results.merge_parts(runner={"a": 1}, adapt={"val": {}}, analysis={"val": {}})


def test_a_stage_cannot_override_what_the_runner_writes(tmp_path, monkeypatch):
    retrofit = pipeline.STAGES["retrofit"]
    monkeypatch.setitem(pipeline.STAGES, "retrofit", lambda run: retrofit(run) | {"seed": 7})
    with pytest.raises(AssertionError, match="seed is written by runner and by retrofit"):
        execute(tmp_path, *RUNS["retrofit"])


def test_the_pages_made_from_the_code_are_up_to_date(tmp_path, monkeypatch, capsys):
    assert make_docs.main(["--check"]) == 0
    monkeypatch.setattr(make_docs, "ROOT", tmp_path)
    assert make_docs.main(["--check"]) == 1 and "docs/result.md is out of date" in capsys.readouterr().err
    assert make_docs.main([]) == 0 and make_docs.main(["--check"]) == 0


@dataclass(kw_only=True)
class Mine(recombine.Cersa):
    """A user's own method, outside of recombine.methods."""

    compresses: ClassVar[bool] = True


@dataclass(kw_only=True)
class Named(recombine.Cersa):
    """Its field is a key that result.json needs."""

    label: str = "x"


def test_a_users_own_method_gets_through_the_final_table(tmp_path, capsys):
    result = execute(tmp_path, *VIT, "method=cersa", f"method._target_={__name__}.Mine", "probe=false")
    assert result["method"]["name"] == "Mine" and result["method"]["label"] == "mine" and result["test"]
    assert result["account"]["retained"] > 1.01 and result["method"]["compresses"] is True
    out = capsys.readouterr().out
    assert "\nmine on tiny_vit, data offline dsprites_loc\n" in out and "store more than dense" in out
    with pytest.raises(recombine.UsageError, match="result.json has label already"):
        execute(tmp_path / "x", *VIT, "method=cersa", f"method._target_={__name__}.Named")


def test_a_run_is_called_what_was_typed(tmp_path, capsys, monkeypatch):
    """Whatever its fields became; without Hydra, what its fields are called."""
    words = [*VIT, "method=lora", "+method.options.use_dora=true", "method@compressor=svd_llm", "stage=joint"]
    words += ["budget=retained_50", "probe=false", f"hydra.run.dir={tmp_path}/a"]
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    assert run.cli() == 0
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert (result["compressor"]["label"], result["method"]["label"]) == ("svd_llm", "lora")
    assert (result["compressor"]["name"], result["method"]["name"]) == ("SvdLlm", "Peft")
    assert "\nsvd_llm + lora on tiny_vit, data offline dsprites_loc\n" in capsys.readouterr().out

    best = f"stage.checkpoint={tmp_path}/a/best.safetensors"
    again = execute(tmp_path / "b", *VIT, "method=crisp", "method.chunk=16", "stage=evaluate", best)
    assert (again["compressor"]["label"], again["method"]["label"]) == ("svd_llm", "dora")  # known by its fields alone
    assert wrong(again, Result) == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("conf/method/*.yaml")), ids=lambda path: path.stem)
def test_a_method_is_known_by_its_fields(path):
    fields = OmegaConf.to_container(OmegaConf.load(path))
    assert labels.label_of(fields["_target_"].rpartition(".")[2], fields) == path.stem


def test_a_method_that_no_file_describes_is_called_by_its_class():
    options = {"config": "LoraConfig", "options": {"init_lora_weights": "olora"}}
    assert labels.label_of("Peft", options) == "peft" and labels.label_of("Mine", {}) == "mine"


@pytest.mark.parametrize("data, title", [
    ({"name": "offline", "task": "emoji"}, "offline: emoji"),
    ({"name": "vtab", "task": "cifar"}, "vtab: CIFAR-100"),
    ({"name": "folder", "task": None}, "folder"),
    ({"name": "imagenet", "task": "imagenet"}, "imagenet"),
    ({"name": "folder", "task": None, "title": "my pictures"}, "my pictures"),
])  # fmt: skip
def test_data_is_called_as_a_reader_knows_it(data, title):
    assert summary.data_title(data) == title


def test_other_configurations_are_told_apart():
    one = {"method": {"rank": 4}, "calibration": {"data": {"name": None}}, "trainer": {"devices": 1}}
    assert results.config_difference(one, one | {"trainer": {"devices": 2}, "new": 1}) is None
    assert results.config_difference(one, one | {"method": {"rank": 8}}) == "method.rank=4 there, 8 here"
    for key, value in (("optim.name", "sgd"), ("quantize.bits", 4), ("trainer.accumulate", 8)):  # of a later version
        group, name = key.split(".")
        later = one | {group: one.get(group, {}) | {name: value}}
        assert results.config_difference(one, later) == f"{key}={LATER[key]} there, {value} here"
        assert results.config_difference(later, one) == f"{key}={value} there, {LATER[key]} here"
    assert results.config_difference(one, one | {"export": ["hf"]}) is None
    pair = one | {"compressor": {"rank": 2}}
    assert results.config_difference(one, pair) == "compressor=None there, compressor.rank=2 here"
    assert results.config_difference(pair, one) == "compressor.rank=2 there, compressor=None here"
    text = one | {"calibration": {"data": "text"}}
    assert results.config_difference(text, one) == "calibration.data=text there, calibration.data.name=None here"


def test_a_score_that_is_no_number_does_not_lose_the_result(tmp_path):
    whole = {"config": {}, "metric": "acc", "val": {"acc": math.nan}, "test": {"loss": -math.inf, "acc": 0.5}}
    found = results.read(results.write(tmp_path / "result.json", whole))
    assert found["val"] == {"acc": None} and found["test"] == {"loss": -math.inf, "acc": 0.5}
    assert math.isnan(results.score(found))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.just('a "NaN" \\'),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("-Infinity"), inner),
    )
)
@settings(max_examples=40, deadline=None)
def test_what_is_written_is_read_back(value):
    """As JSON of the standard, which has no words for infinities, and in one line as in several."""
    for options in ({}, {"indent": 1}, {"ensure_ascii": False, "separators": (",", ":")}):
        assert json.loads(results.dumps(value, **options), parse_constant=pytest.fail) == value


def test_a_finished_run_with_infinities_is_found_and_shown(tmp_path, capsys):
    """Its score and its curves, and its configuration; the report keeps them too."""
    words = [*VIT, "method=linear_probe", "probe=false"]
    result = execute(tmp_path, *words)
    for key in ("val", "test", "curves"):
        result[key] = json.loads(json.dumps(result[key]).replace(str(result["val"]["acc"]), "Infinity"))
    result["test"]["acc"] = math.inf
    results.write(tmp_path / "result.json", result)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert ranks.main(compose("config", words), tmp_path) == math.inf
    out = capsys.readouterr().out
    assert "finished before" in out and "accuracy inf %" in out
    config = {"optim": {"clip": math.inf}}
    results.write(tmp_path / "with" / "result.json", result | {"config": config})
    assert results.load_finished(tmp_path / "with", config, [])["config"] == config
    record = records.Record({}, results.read(tmp_path / "result.json"), "cell")
    (line,) = records.dump([record]).splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["val"]["acc"] == math.inf
    score = table_data.Measure("accuracy", "test.{metric}", scale=100, best="max")
    assert score.of(record) is None and score.of(replace(record, result=record.result | {"test": {"acc": 0.5}})) == 50


@pytest.mark.parametrize(
    "text", ["[]", "5", "null", '{"config": 5}', '{"config": {}, "val": {}, "metric": "acc"}', "["]
)
def test_a_file_of_another_shape_is_no_finished_run(text, tmp_path):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(recombine.UsageError, match="result.json.*move it away") as error:
        results.load_finished(tmp_path, {}, [])
    assert "\n" not in str(error.value)


def test_nobody_takes_the_lock_of_a_folder_while_it_is_given_back(tmp_path, monkeypatch):
    """Another process that asks as the lock's file goes is refused; whoever comes later has it alone."""
    remove, asked = Path.unlink, []

    def unlink(path, **options):
        if path.name == results.LOCK and not asked:
            asked.append(path)
            with pytest.raises(UsageError, match="another process"), results.lock_folder(tmp_path):
                pass
        return remove(path, **options)

    monkeypatch.setattr(Path, "unlink", unlink)
    with results.lock_folder(tmp_path):
        pass
    assert asked and not asked[0].exists()
    with results.lock_folder(tmp_path):
        assert results.running(tmp_path)


def test_a_result_that_came_since_the_run_was_looked_at_is_not_overwritten(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline.plan, "at_start", lambda spec: (tmp_path / "result.json").write_text("theirs"))
    words = [*VIT, "method=lora", "probe=false", f"hydra.run.dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    assert run.cli() == 2
    assert "another process has just written it" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["theirs"]


def test_a_result_of_a_file_that_changed_since_is_refused(tmp_path, monkeypatch):
    (tmp_path / "result.json").touch()
    base = tmp_path / "base.safetensors"
    digest = hashlib.sha256(b"one").hexdigest()
    for part in (
        {"config": {"stage": {"name": "evaluate", "checkpoint": str(base)}}, "sha256": {base.name: digest}},
        {"config": {"stage": {"name": "adapt"}}, "base": {"path": str(base), "sha256": digest}},
        {"config": {"model": {"checkpoint": str(base)}}, "weights": {"sha256": {base.name: digest}}},
        {"config": {"model": {"checkpoint": str(tmp_path)}}, "weights": {"sha256": {base.name: digest}}},
    ):
        monkeypatch.setattr(results, "read", lambda *_, part=part: {"command": ""} | part)
        base.write_bytes(b"one")
        assert results.load_finished(tmp_path, part["config"], [])["config"] is part["config"]
        base.write_bytes(b"another")
        with pytest.raises(UsageError, match="has changed since"):
            results.load_finished(tmp_path, part["config"], [])


def test_a_key_that_was_added_for_one_run_is_another_configuration(tmp_path, capsys, monkeypatch):
    """A key that one of two results lacks may have come with a version; one that was typed with a plus has not."""
    plain = [*VIT, "method=lora", "probe=false", f"hydra.run.dir={tmp_path}"]
    for words, code in ((plain, 0), ([*plain, "+model.drop_rate=0.5"], 2), (plain, 0)):
        monkeypatch.setattr(sys, "argv", ["run.py", *words])
        assert run.cli() == code
        said = capsys.readouterr()
        assert ("another configuration (only one of them has model.drop_rate)" in said.err) == (code == 2)
        assert "drop_rate" not in (tmp_path / ".hydra" / "config.yaml").read_text()  # of the run that is there
    assert "finished before" in said.out
    (tmp_path / "result.json").unlink()
    for words, code in (([*plain, "+model.drop_rate=0.5"], 0), (plain, 2)):
        monkeypatch.setattr(sys, "argv", ["run.py", *words])
        assert run.cli() == code
