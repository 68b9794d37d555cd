"""Every experiment of conf/experiment: its cells are runs, its report speaks of axes, keys and numbers that exist."""

import csv
import json
from functools import cache

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.conf import HydraConf, OverridesConf
from omegaconf import OmegaConf
from torch import nn

from helpers import ROOT
from recombine import data, models, results
from recombine.core.budget import Budget
from recombine.core.rewrite import find_sites
from recombine.report import plots, records, table
from recombine.report.paper import Paper, select
from recombine.report.records import Record, Runs
from recombine.report.table import labels
from recombine.runner import config, effects, grid, method_pair, ranks
from recombine.stages.compress import require_small_fields

NAMES = sorted(str(p.relative_to(grid.CONF / "experiment"))[:-5] for p in grid.CONF.glob("experiment/*/*.yaml"))
OTHER = ("commonsense", "gsm8k", "dreambooth", "subject")  # data that score otherwise than pictures' classes
HERE = ("cersa/", "jactus/", "offline/cersa", "offline/jactus")  # whose keys are those of the run below


@pytest.fixture(scope="module")
def experiments():
    return {name: found for name in NAMES if (found := grid.load(name)).grid and found.report}


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """What a run leaves that measures everything."""
    folder = tmp_path_factory.mktemp("run")
    small = ["model=tiny_vit", "trainer=cpu", "trainer.progress=false", "trainer.epochs=1", "probe=false"]
    asked = ["analyse.subspaces=0.9", "analyse.maps=2", "analyse.elsewhere=[clevr_count]", "data.limit=40"]
    with initialize_config_dir(str(grid.CONF), version_base="1.3"):
        cfg = compose("config", [*small, *asked, "method=cersa"])
    ranks.main(cfg, folder)
    return Record({}, records.slim(results.read(folder / "result.json"), "run"), "run")


@cache
def model(config: str) -> nn.Module:
    """The model of a configuration, without memory."""
    with torch.device("meta"):
        return models.build(**json.loads(config) | {"pretrained": False, "checkpoint": None})


def sample(experiment):
    """Cells that show every label of the labelled axes, and some values of the others."""
    axes = {axis: labels([cell.labels for cell in experiment.cells], axis) for axis in experiment.grid}
    count = max([2, *(len(points) for points in experiment.grid.values() if isinstance(points, dict))])
    wanted = [{axis: names[i % len(names)] for axis, names in axes.items()} for i in range(count)]
    return [cell for cell in experiment.cells if cell.labels in wanted]


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_runs(name, experiments):
    if name not in experiments:
        pytest.skip("a base that other experiments share")
    with initialize_config_dir(str(grid.CONF), version_base="1.3"):
        for cell in sample(experiments[name]):
            cfg = compose("config", [f"experiment={name}", *cell.overrides])
            typed = [f"experiment={name}", *cell.overrides]
            effects.refuse_misleading(cfg, HydraConf(overrides=OverridesConf(task=typed)))
            OmegaConf.resolve(cfg)
            if cfg.model.get("library") == "diffusers":
                pytest.importorskip("diffusers")
            config.resolve(cfg)
            for method in filter(None, method_pair.resolve_methods(cfg)):
                net = model(json.dumps(OmegaConf.to_container(cfg.model), sort_keys=True))
                assert find_sites(net, method)
            if cfg.stage.name in ("compress", "joint"):
                first = method_pair.resolve_methods(cfg)[1] or method
                require_small_fields(net, first, Budget.parse(cfg.budget), cfg.stage.name)
            if cfg.data.name == "dreambooth":  # looks for the user's folder at once
                continue
            module = data.build(**OmegaConf.to_container(cfg.data), seed=cfg.seed)
            assert module.task == cfg.data.task
            for task in cfg.analyse.elsewhere:
                data.build(**OmegaConf.to_container(cfg.data) | {"task": task}, seed=cfg.seed)


@pytest.mark.parametrize("name", NAMES)
def test_report_speaks_of_what_exists(name, experiments, record):
    if name not in experiments:
        pytest.skip("a base that other experiments share")
    experiment = experiments[name]
    spec, cells = experiment.report, [cell.labels for cell in experiment.cells]
    made = table.build(name, spec, Runs([], cells, {}))
    assert made.total == len(cells) and made.rows and all(len(row.entries) == len(made.columns) for row in made.rows)
    for key, given in (spec.get("plots") or {}).items():
        options = plots.check(key, given, Runs([], cells, {}))
        assert all(str(v) in {c[axis] for c in cells} for axis, v in options.where.items() if not isinstance(v, list))
    if "paper" in spec:
        check_paper(spec, made, cells)
    if name.startswith(HERE):
        for key in keys(spec):
            check_key(key, experiment.config, record)


def check_paper(spec, made, cells):
    """Every label that the paper's numbers are looked up by is one of the table, every name one of the file."""
    paper = Paper(spec["paper"])
    ours = {
        "rows": {" / ".join(row.labels) for row in made.rows},
        "columns": set(labels(cells, spec["columns"])) if spec.get("columns") else set(),
        "values": set(spec["values"]),
        "means": set(spec.get("means") or {}),
        "extra": set(spec.get("extra") or {}),
    }
    for kind, column in (("rows", "row"), ("columns", "dataset"), ("values", "metric"), ("means", "dataset")):
        for label, theirs in paper.spec.get(kind, {}).items():
            if kind == "columns" and label not in ours[kind]:  # a map of all sets serves tables of some
                continue
            assert label in ours[kind], f"{kind}: {label} is not in the table"
            wanted = select(theirs, column)
            assert paper.find(wanted) or "none" in wanted.values(), f"{kind}: {theirs} is not in the file"
    assert set(paper.spec.get("extra", {})) <= ours["extra"]
    found = [e.paper for row in made.rows for e in row.entries if e.paper]
    assert found, "none of the paper's numbers is found"
    if spec.get("columns") and "columns" in paper.spec:
        assert ours["columns"] <= set(paper.spec["columns"])


def keys(spec):
    """The paths into a result that a report reads."""
    found = [value["key"] for kind in ("values", "extra") for value in (spec.get(kind) or {}).values()]
    for plot in (spec.get("plots") or {}).values():
        if plot["kind"] == "ranks":
            found.append(f"layers.q.{plot['y']}")
            continue
        for key in ("x", "y", "reference"):
            given = plot.get(key) or ()
            found += given.values() if isinstance(given, dict) else [given] if given else ()
    return [key for key in found if key != "value"]


def check_key(key, cfg, record):
    if key.startswith("elsewhere.") and key.count(".") == 2:
        assert key.rpartition(".")[2] in cfg.analyse.elsewhere
        key = key.rpartition(".")[0] + ".clevr_count"
    if key in cfg.grid or cfg.data.name in OTHER:  # an axis
        return
    assert record.get(key) is not None, f"{key} is not in a result"


@pytest.mark.parametrize("csv_name, model", [("tab11_hparams_vitl", "vit_l16"), ("tab12_hparams_vitb", "vit_b16")])
def test_image_settings_are_those_of_cersas_tables_11_and_12(csv_name, model):
    with (ROOT / "experiments" / "cersa" / f"{csv_name}.csv").open(newline="") as file:
        told = {(row["dataset"], row["row"]): float(row["value"]) for row in csv.DictReader(file)}
    with initialize_config_dir(str(grid.CONF), version_base="1.3"):
        for task in data.suite("vision8"):
            cfg = compose("config", ["experiment=cersa/images", f"model={model}", f"data.task={task}"])
            found = {
                "attention_dropout": cfg.model.attn_drop, "weight_decay": cfg.optim.weight_decay, "lr": cfg.optim.lr,
                "lr_classifier": cfg.optim.lr_head,
            }  # fmt: skip
            assert found == {row: value for (name, row), value in told.items() if name == cfg.sets[task]}
            assert (cfg.model.tag, cfg.optim.schedule, cfg.optim.warmup) == ("orig_in21k", "linear", 0.08)


def test_the_lines_of_constant_height_are_what_lora_costs():
    """The dashed lines of Fig. 7, LoRA with r = 32 on Q and V: 1 + 4 (m + n) r / (m n) of matrices or models."""
    wide = grid.load("cersa/fig07").report["plots"]["rates"]["hline"]
    for name, (width, depth, total) in {"ViT-B": (768, 12, 85_798_656), "ViT-L": (1024, 24, 303_301_632)}.items():
        rate = 1 + 4 * 2 * depth * 32 * 2 * width / (total + 101 * width)
        assert wide[f"{name}, LoRA r = 32 on Q, V"] == pytest.approx(rate, abs=1e-3)
    small = grid.load("offline/cersa_fig07").report["plots"]["rates"]["hline"]
    assert small["LoRA r = 32 on Q, V"] == pytest.approx(1 + 4 * 2 * 32 / 384, abs=1e-3)
