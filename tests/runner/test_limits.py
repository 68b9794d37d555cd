"""What this machine cannot do, and what the run does not read, is said before anything starts."""

from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from hydra.conf import HydraConf, OverridesConf
from hydra.types import RunMode
from omegaconf import OmegaConf

from helpers import CONF, refusal
from helpers.command import CHUNK, line
from recombine.evaluation import harness
from recombine.runner import effects, limits, override_lines, pipeline, plan
from recombine.runner.config import resolve
from recombine.runner.idle import idle
from recombine.runner.sweep_settings import best_trial, require_search
from recombine.runtime import conf
from recombine.stages import STAGES


def hydra(*typed: str, mode: RunMode = RunMode.RUN, own: tuple[str, ...] = ()) -> HydraConf:
    return HydraConf(mode=mode, overrides=OverridesConf(task=[*typed], hydra=[*own]))


def composed(*typed: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", [*typed])


def test_processes_beyond_the_cores(monkeypatch):
    monkeypatch.setattr(limits, "cores", lambda: 4)
    limits.require_cores(4)
    limits.require_workers(16)
    assert "trainer.devices=5: this machine has 4 cores" in refusal(limits.require_cores, 5)
    assert "say data.num_workers=16 or less" in refusal(limits.require_workers, 17)
    monkeypatch.setattr(limits, "cores", lambda: 1)
    limits.require_cores(2)  # two ranks can be tried anywhere


def test_weights_beyond_the_memory():
    said = refusal(plan.at_start, resolve(composed("model=tiny_llama", "data=text", f"model.hidden_size={2**20}")))
    assert "model=tiny_llama: 5.28e+04 GB of weights do not fit into" in said and "model.dtype=bfloat16" in said


def test_weights_beyond_the_memory_that_stay_in_their_files(monkeypatch):
    """A retrofit on a processor reads them block by block. A training holds them; what is drawn is in memory."""
    keys = (
        "model=llama32_1b",
        "method=svd_llm",
        "data=text",
        "budget=retained_70",
        "data.max_length=64",
        "calibration.batch_size=4",
    )
    monkeypatch.setattr(limits, "memory", lambda: 24 * 10**8)  # of 2.47 GB
    plan.at_start(resolve(composed(*keys, "stage=retrofit")))
    for other in (["stage=adapt", "probe=false"], ["stage=retrofit", "model.pretrained=false"]):
        assert "2.47 GB of weights do not fit into 2.4 GB" in refusal(plan.at_start, resolve(composed(*keys, *other)))


def test_a_container_has_less_memory_than_its_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(limits, "CGROUP", tmp_path / "memory.max")
    whole = limits.memory()
    for text, expected in (("max\n", whole), ("1048576\n", 2**20), (f"{2 * whole}\n", whole)):
        (tmp_path / "memory.max").write_text(text)
        assert limits.memory() == expected


def test_pictures_beyond_the_memory():
    data = SimpleNamespace(image_size=4096, batch_size=2**20, train=range(64))
    limits.require_batch(data)  # a batch is no larger than the set
    data.train = range(2**20)
    assert "1048576 pictures of 4096 x 4096 take 196608.0 GiB" in refusal(limits.require_batch, data)


def test_tasks_of_the_harness_are_known_before_anything_is_loaded(capsys, monkeypatch, tmp_path):
    assert "no language model" in line(capsys, monkeypatch, tmp_path, CHUNK, "harness.tasks=[capital_of]")
    assert harness.require_known(["capital_of"], None) == []
    assert "LLM-Adapters" in refusal(harness.require_known, ["commonsense_boolq"], tmp_path)


def test_every_stage_says_what_it_does_not_read():
    assert effects.UNREAD.keys() == STAGES.keys()


@pytest.mark.parametrize(
    "typed, words",
    [
        (["stage=evaluate", "budget=retained_50"], ["budget=retained_50", "compresses nothing"]),
        (["stage=evaluate", "method@compressor=svd"], ["method@compressor=svd", "compresses nothing"]),
        (["only=[LoRA]"], ["only=[LoRA]", "experiment=NAME"]),
    ],
    ids=lambda given: given[-1],
)
def test_what_would_mislead_is_refused(typed, words):
    said = refusal(effects.refuse_misleading, composed(*typed), hydra(*typed))
    assert all(word in said for word in words), said


def test_what_misleads_nobody_passes():
    for typed in (["stage=evaluate", "budget=none"], ["stage=joint", "budget=retained_50"], ["only=null"]):
        effects.refuse_misleading(composed(*typed), hydra(*typed))


@pytest.mark.parametrize(
    "typed, unread",
    [
        (["stage=retrofit", "optim.lr=1", "++trainer.epochs=3", "seed=1"], ["optim.lr=1", "++trainer.epochs=3"]),
        (["stage=retrofit", "optim.head=probe"], []),
        (["stage=retrofit", "harness.limit=3"], ["harness.limit=3"]),
        (["stage=retrofit", "stage.test=true", "harness.limit=3"], []),
        (
            ["stage=evaluate", "method=lora", "method.rank=4", "optim=sgd"],
            ["method=lora", "method.rank=4", "optim=sgd"],
        ),
        (["stage=evaluate", "method=svd", "stage.bits=8"], []),
        (["stage=profile", "stage.rounds=0", "stage.keep=false"], ["stage.keep=false"]),
        (["stage=profile", "stage.rewrite=false", "stage.rounds=3"], ["stage.rounds=3"]),
        (
            ["stage=profile", "trainer.accumulate=3", "trainer.matmul=high"],
            ["trainer.accumulate=3", "trainer.matmul=high"],
        ),
        (["stage=compress", "optim.lr=1", "optim.lr_head=1"], ["optim.lr=1"]),
        (["stage=adapt", "optim.lr=1", "retry=true"], ["retry=true", "hydra.launcher.jobs=2"]),
    ],
)
def test_keys_without_effect_are_said(typed, unread, capsys):
    own = ("hydra.launcher.jobs=2",) if "retry=true" in typed else ()
    effects.say_unread(OmegaConf.to_container(composed(*typed)), hydra(*typed, own=own))
    said = capsys.readouterr().err
    assert said.endswith(f": {' '.join(unread)}\n") if unread else said == ""


@pytest.mark.parametrize(
    "typed, unread",
    [
        (["method=svd", "method.rank=4"], {"method.ratio"}),
        (["method=svd", "budget=retained_50"], {"method.ratio"}),
        (["method=svd", "budget=energy_90"], {"method.energy"}),
        (["budget=trainable_2k"], {"method.chunk"}),
        (["optim.lr=1"], {"method.lr"}),
        (["optim.lr=1", "stage=joint", "stage.distil.lr=null"], set()),
        (["optim.lr=1", "stage=joint", "stage.distil.lr=1"], {"method.lr"}),
        (
            ["method@compressor=svd", "method=lora", "budget=retained_50", "optim.lr=1"],
            {"compressor.ratio", "method.lr"},
        ),
        (
            ["method@compressor=svd", "method=lora", "budget=trainable_2k", "stage=joint"],
            {"method.rank", "compressor.lr"},
        ),
    ],
    ids=lambda given: " ".join(sorted(given)),
)
def test_keys_that_another_key_overrules(typed, unread):
    data = SimpleNamespace(objective="classification", num_classes=3)
    assert idle(resolve(composed("model=tiny_vit", *typed)), data) - {"harness", "sample"} == unread


def test_keys_that_the_data_do_not_read():
    spec = resolve(composed("model=tiny_llama", "data=text", "stage=joint", "stage.distil.epochs=0", "method=svd"))
    assert idle(spec, SimpleNamespace(objective="lm", num_classes=None)) == {
        *("probe", "optim.head", "optim.label_smoothing", "sample"),
        *(f"stage.distil.{key}" for key in conf.load("stage", "compress")["distil"] if key != "epochs"),
        *("stage.distil.name", "stage.distil.lr_ratio"),
    }


def test_in_a_sweep_its_keys_have_effect(capsys):
    sweep = hydra("retry=true", mode=RunMode.MULTIRUN, own=("hydra.launcher.jobs=2",))
    effects.say_unread(OmegaConf.to_container(composed()), sweep)
    assert capsys.readouterr().err == ""


def test_a_joint_run_that_compresses_nothing_is_refused(capsys, monkeypatch, tmp_path):
    early = line(capsys, monkeypatch, tmp_path, "stage=joint", CHUNK)
    assert "crisp with these fields holds 107.4 %" in early and "budget=retained_50" in early
    spectra = ["method=svd", "method.energy=0.99999", "stage=compress"]
    late = line(capsys, monkeypatch, tmp_path, *spectra)
    assert "stage=compress: svd with these fields holds" in late
    assert not list(tmp_path.rglob("distilled*"))


SEARCH = {"direction": "maximize", "n_trials": 20, "n_jobs": 1, "max_failure_rate": 1.0, "params": None}


@pytest.mark.parametrize(
    "params, typed, words",
    [
        ({"n_trials": 0}, ["seed=0,1"], ["hydra.sweeper.n_trials=0", "from 1"]),
        ({"direction": "up"}, ["seed=0,1"], ["hydra.sweeper.direction=up"]),
        ({}, ["optim.lr=interval(5,1)"], ["optim.lr=interval(5,1)", "interval(LOWEST,HIGHEST)"]),
        ({}, ["optim.lr=tag(log,interval(0,1))"], ["larger than 0 for a log"]),
        ({"params": {"optim.lr": "interval(2,1)"}}, [], ["optim.lr=interval(2,1)"]),
        ({}, ["seed=0"], ["no key has values to choose from"]),
        ({}, ["seed=0,1", "stage=retrofit"], ["stage=retrofit", "validation score"]),
        ({}, ["seed=0,1", "data=vtab", "data.select=last"], ["data.select=last", "data.select=val"]),
    ],
)
def test_a_search_that_cannot_score_is_refused(params, typed, words):
    pytest.importorskip("optuna")
    cfg = composed(*(line for line in typed if len(grid_values(line)) == 1))
    said = refusal(require_search, SEARCH | params, cfg, typed)
    assert all(word in said for word in words), said
    require_search(SEARCH, composed(), ["seed=0,1"])


def grid_values(override: str) -> list[str]:
    return ["interval", "no grid"] if "interval" in override else override_lines.values(override)


def test_a_search_says_what_it_found(tmp_path):
    found = {"name": "optuna", "best_params": {"method.rank": 8}, "best_value": 0.5}
    OmegaConf.save(found, tmp_path / "optimization_results.yaml")
    assert best_trial(tmp_path).startswith("best: method.rank=8, validation score 0.5; ")


@pytest.mark.parametrize(
    "typed, words",
    [
        (["hydra.launcher.jobs=0"], ["hydra.launcher.jobs=0", "from 1"]),
        (["hydra/launcher=slurm", "hydra.launcher.nodes=0"], ["hydra.launcher.nodes=0"]),
        (["hydra/launcher=slurm", "hydra.launcher.srun_args=5"], ["hydra.launcher.srun_args=5", "a list"]),
        (["grid=5"], ["grid=5", "axes"]),
        (["only=[x]"], ["only", "there is none"]),
    ],
    ids=lambda given: given[-1],
)
def test_keys_of_launchers_are_checked_before_a_sweep_starts(typed, words, capsys, monkeypatch, tmp_path):
    said = line(capsys, monkeypatch, tmp_path, "seed=0,1", "-m", f"hydra.sweep.dir={tmp_path}/sweep", CHUNK, *typed)
    assert all(word in said for word in words), said
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    "typed, words",
    [
        (
            ["model=tiny_bert", "data=sentences", "data.select=last", "trainer.patience=2"],
            "trainer.patience=2: without",
        ),
        (["model=tiny_vit", "data.limit=8", "optim=muon", "trainer=fsdp"], "optim.name=muon: not with trainer=fsdp"),
        (
            ["model=tiny_vit", "data.limit=8", "stage=joint", "method@compressor=svd", "budget=retained_50"]
            + ["quantize.bits=8", "trainer=fsdp"],
            "quantize.bits=8: packed weights are not divided",
        ),
    ],
    ids=["patience", "muon", "packed"],
)
def test_what_a_training_refuses_is_refused_before_all_work(typed, words, tmp_path):
    typed = [*typed, "method=lora", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.devices=1"]
    assert words in refusal(pipeline.set_up, resolve(composed(*typed)), tmp_path)
