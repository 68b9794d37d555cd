"""Experiments can be planned, offline and without a weight: a cell for each form that their first cells have."""

import socket
from importlib.util import find_spec

import pytest
import torch
from hydra import compose, initialize_config_dir

from helpers import CONF
from recombine.errors import UsageError
from recombine.runner import grid, plan_devices, plan_table

NAMES = sorted(str(p.relative_to(CONF / "experiment"))[:-5] for p in CONF.glob("experiment/**/*.yaml"))
GPU = plan_devices.Device("a test's", 8 * 10**10, {torch.float32: 1e12}, 1e11, 1e10, True)
OF_THE_USER = ("cersa/fig08",)  # pictures that lie in a folder of theirs


def first(experiment: grid.Experiment):
    """The configuration of an experiment's first cell, or of the experiment, where it has no grid."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", [f"experiment={experiment.name}", *experiment.cells[0].overrides])


def form(cfg) -> tuple:
    """Which method on which model in which stage, under which kind of budget."""
    method = [node and node._target_ for node in (cfg.method, cfg.get("compressor"))]
    return *method, cfg.model.name, cfg.stage.name, str(cfg.budget).partition("_")[0], str(cfg.quantize.bits)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a plan asks the network for something")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_every_form_of_a_first_cell_can_be_planned():
    """Of cells with the same form the first is planned. One that needs a folder of the user's says so in a line."""
    planned, refused = {}, {}
    for name in NAMES:
        if (experiment := grid.read(name)).grid and not experiment.report:
            continue  # a base that others share, with data that they choose
        cfg = first(experiment)
        if cfg.model.get("library") == "diffusers" and find_spec("diffusers") is None:
            continue
        if (found := form(cfg)) in planned:
            continue
        try:
            planned[found] = plan_table.planned(cfg, GPU)
        except UsageError as error:
            refused[name] = str(error)
    assert refused.keys() <= set(OF_THE_USER), refused
    assert all("there is no such folder" in line and "\n" not in line for line in refused.values())
    assert len(planned) > 30
    for found, plan in planned.items():
        assert plan.peak >= plan.told.weights > 0 and plan.told.phases, found
        trains = {"adapt", "joint", "compress"} & set(found)
        assert bool(trains) <= bool(plan.told.parameters["trained"]), found
