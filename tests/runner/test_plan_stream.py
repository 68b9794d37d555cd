"""How calibration keeps to its memory: a plan foresees what the run does."""

from dataclasses import replace

import pytest
import torch

from helpers.command import config, execute
from recombine import models
from recombine.core import digesting, memory, rewrite, stream
from recombine.core.sites import block_of
from recombine.methods.from_config import from_name
from recombine.models import roles
from recombine.runner import plan, plan_devices, plan_run
from recombine.runner.config import resolve
from recombine.runtime import conf
from recombine.runtime.memory import shown

GPU = plan_devices.Device("a test's", 10**12, {torch.float32: 1e12}, 1e11, 1e10)
RUN = ("stage=retrofit", "method=svd_llm", "budget=retained_60", "probe=false", "trainer.progress=false")


def limits() -> dict[str, str]:
    """Words for calibration.memory that hold all sums, those of one block, and less."""
    model = models.build(**conf.load("model", "tiny_vit") | {"pretrained": False})
    method = from_name("svd_llm", {}, "method")
    roles.split_fused(model, method.targets)
    sites, names = rewrite.find_sites(model, method), roles.block_names(model)
    one = memory.sums([site for site in sites if block_of(site.name, names) == 0], {"inputs"})
    return {"at once": "1gb", "blocks": shown(2.2 * one), "passes": shown(1.5 * one)}


@pytest.mark.parametrize("how", ["at once", "blocks", "passes"])
def test_a_plan_foresees_what_the_run_decides(tmp_path, monkeypatch, how):
    monkeypatch.setattr(memory, "WORK", 0)  # tiny sums, beside the work on one layer
    typed = (*RUN, f"calibration.memory={limits()[how]}")
    told = plan_run.rehearsed(resolve(config(*typed)), plan_devices.find("here", "cpu", timed=False))
    ways, sweeps, way, sweep = [], [], digesting.way, stream.Chain.sweep
    monkeypatch.setattr(digesting, "way", lambda *given: ways.append(way(*given)) or ways[-1])
    monkeypatch.setattr(stream.Chain, "sweep", lambda chain, *given: (sweeps.append(chain), sweep(chain, *given)))
    execute(tmp_path, *typed)
    (found,) = ways
    assert (found.blocks is not None) == bool(sweeps) == (how == "blocks")
    assert told.passes == (plan_run.STREAMED if sweeps else len(found.passes))
    assert (len(found.passes) > 1) == (how != "at once")
    spoken = {"blocks": "block by block", "passes": f"takes {len(found.passes)} passes"}
    assert [note for note in told.notes if spoken.get(how, "calibration") in note] == told.notes
    calibrates = next(phase for phase in told.phases if phase.name == "calibrate")
    assert calibrates.held["statistics"] == told.sums > 0


def test_the_verdict_names_the_memory_that_makes_a_calibration_fit(monkeypatch):
    """The statistics of all layers at once are too large for the device, those of fewer are not."""
    monkeypatch.setattr(memory, "WORK", 0)
    run = resolve(config(*RUN, f"calibration.memory={limits()['at once']}", "calibration.samples=1"))
    fits = plan.plan(run, GPU)
    assert fits.verdict == "fits" and not fits.told.notes
    typed = f"calibration.memory={limits()['blocks']}"
    less = plan.plan(resolve(config(*RUN, typed, "calibration.samples=1")), GPU)
    assert less.peak < fits.peak and "block by block" in less.told.notes[0]
    monkeypatch.setattr(plan.memory, "shown", lambda size: typed.partition("=")[2])
    tight = plan.plan(run, replace(GPU, memory=int((less.peak + fits.peak) / 2 / plan.SPARE)))
    assert tight.verdict.startswith("does not fit") and f"; {typed} does" in tight.verdict
