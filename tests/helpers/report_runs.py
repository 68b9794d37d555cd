"""Results of runs that were never made, and a report over them."""

import itertools

import numpy as np
from omegaconf import OmegaConf

from recombine import report
from recombine.report import table, table_data
from recombine.report.records import Record, Runs
from recombine.runner.grid import Experiment

TAB07 = "experiments/cersa/tab07_vitl_8datasets.csv"
METHODS, TASKS, SEEDS = ("LoRA", "CERSA", "SVFit"), ("a", "b", "c"), ("0", "1", "2")
RNG = np.random.default_rng(0)
SCORES = RNG.uniform(0.5, 0.9, (3, 3, 3))  # (method, task, seed)


def runs(keep=lambda labels: True, **more) -> Runs:
    """A full grid of results with the numbers of SCORES, of which some are left out."""
    cells = [
        {"method": m, "data.task": t, "seed": s} for s, t, m in itertools.product(SEEDS, TASKS, METHODS)
    ]  # as a grid orders them: the last axis slowest
    made = []
    for cell in filter(keep, cells):
        i, j, k = METHODS.index(cell["method"]), TASKS.index(cell["data.task"]), SEEDS.index(cell["seed"])
        result = {
            "cell": "/".join(cell.values()),
            "metric": "acc",
            "test": {"acc": float(SCORES[i, j, k])},
            "account": {"memory_mib": 100.0 * (i + 1), "trained": 10**i},
            "curves": {"train/loss": [3.0 - i, 2.0 - i / 2 + k / 10, 1.0]},
            "layers": {"q": {"rank": [4 + i, 6 + i]}, "o": {"rank": [8, 10]}},
            "similarity": {"q": [[1.0, 0.9], [0.99, 0.999]]},
            "environment": {"commit": "a" * 40, "device": "cpu", "versions": {"torch": "2.13.0"}},
        }
        made.append(Record(cell, result | {k: v(cell) for k, v in more.items()}, result["cell"]))
    return Runs(made, cells, {})


SPEC = {
    "title": "A table",
    "rows": "method",
    "columns": "data.task",
    "values": {"top-1": {"key": "test.{metric}", "scale": 100, "digits": 1, "best": "max"}},
    "extra": {"memory": {"key": "account.memory_mib", "digits": 1, "best": "min"}},
    "means": {"ab": ["a", "b"], "groups": ["ab", "c"], "mean": None},
}


def entries(made: table.Table, row: str) -> dict[str, table_data.Entry]:
    (found,) = (r for r in made.rows if r.name == row)
    return dict(zip([c.title for c in made.columns], found.entries, strict=True))


EVIL = '<img src=x onerror="document.title=1"> & "quoted"'
PAPER = {"file": TAB07, "where": {"metric": "top1"}, "columns": {"a": "CIFAR-100", "b": "DTD"}}
PLOTS = {
    "losses": {"kind": "curves", "y": "curves.train/loss", "line": "method"},
    "memory": {"kind": "xy", "x": "account.memory_mib", "y": "test.acc", "point": "method", "xlabel": EVIL},
    "subspaces": {"kind": "heat", "y": "similarity", "where": {"method": "LoRA"}},
}


def one(name: str, found: Runs, **more) -> report.Report:
    """A report of fabricated runs."""
    axes = {axis: list(dict.fromkeys(cell[axis] for cell in found.cells)) for axis in found.cells[0]}
    spec = SPEC | {"plots": PLOTS, "paper": PAPER} | more
    experiment = Experiment(name, OmegaConf.create({"grid": axes, "report": spec, "only": None}))
    return report.Report(experiment, found, table.build(name, spec, found))
