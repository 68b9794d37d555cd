"""A plan of a model that draws: sizes as in Stable Diffusion's files, numbers as in a run, nothing fetched."""

import pytest
import torch

pytest.importorskip("diffusers")  # an extra

from hydra import compose, initialize_config_dir  # noqa: E402

from helpers import CONF, config, drawing  # noqa: E402
from helpers.command import execute, own_peak  # noqa: E402
from recombine import models  # noqa: E402
from recombine.models import diffusion_unread, packaged  # noqa: E402
from recombine.models.drawing import draw  # noqa: E402
from recombine.runner import plan, plan_devices, plan_drawing, plan_run  # noqa: E402
from recombine.runner.config import resolve  # noqa: E402

GPU = plan_devices.Device("a test's", 8 * 10**10, {torch.float32: 1e12}, 1e11, 1e10, True)


def spec(*typed):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return resolve(compose("config", [*typed]))


def test_stable_diffusion_has_the_sizes_of_its_files(tmp_path):
    """UNet, text encoder and autoencoder as its repository states them, without one of its files."""
    typed = ["model=sd21_base", "data=dreambooth", f"data.root={drawing.subject(tmp_path)}", "data.batch_size=1"]
    found = plan.plan(spec(*typed, "method=full"), GPU)
    assert found.told.parameters == {"total": 865_910_724, "trained": 865_910_724}
    assert {phase.held["frozen parts"] for phase in found.told.phases} == {4 * (340_387_840 + 83_653_863)}
    assert found.downloads == 4 * (865_910_724 + 340_387_840 + 83_653_863)
    assert [phase.name for phase in found.told.phases] == ["load", "prior", "rewrite", "train", "draw", "test"]
    assert found.verdict == "fits" and found.told.samples == {"train": 100, "test": 40}
    trains = spec(*typed, "method=full", "model.train_text=true")
    assert plan_run.rehearse(trains, GPU).parameters["total"] == 865_910_724 + 340_387_840


def test_the_packaged_text_encoder_is_counted():
    model = models.build(**config("tiny_diffusion") | {"pretrained": False})
    own = sum(p.numel() * p.element_size() for p in packaged_encoder(model).parameters())
    diffusion_unread.without_files(model, config("tiny_diffusion"))
    assert plan_drawing.frozen(model) == own


def packaged_encoder(model):
    ids = torch.ones(1, 3, dtype=torch.long)
    model.parts.inner.states(ids, torch.ones_like(ids))
    return model.parts.inner.encoder


def test_what_is_planned_is_what_the_run_does(tmp_path, monkeypatch):
    weights = packaged.dinov2_s14_weights()
    (tmp_path / "cache" / "weights").mkdir(parents=True)
    (tmp_path / "cache" / "weights" / weights.name).symlink_to(weights)
    monkeypatch.setenv("RECOMBINE_CACHE", str(tmp_path / "cache"))
    typed = [*drawing.COMMAND, "data=dreambooth", f"data.root={drawing.subject(tmp_path)}", *drawing.SHORT]
    typed += ["method=lora", "method.rank=2", "sample.seeds=[0,1]", "sample.steps=2"]
    told = plan_run.rehearse(spec(*typed), plan_devices.find("here", "cpu", timed=False))
    calls = []
    monkeypatch.setattr("recombine.models.diffusion.draw", lambda *a, **k: (calls.append(len(a[3])), draw(*a, **k))[1])
    account = execute(tmp_path / "run", *typed)["account"]
    assert told.parameters["trained"] == account["trained"] and told.samples == {"train": 5, "test": 40}
    assert calls == [3, 2, 2]  # of the class before, then two prompts
    one = {phase.name: phase.cost.products[torch.float32] for phase in told.phases}
    assert one["prior"] / 3 * 4 == pytest.approx(one["draw"], rel=0.05)  # pictures, the adapter apart


@pytest.mark.full
def test_the_peak_is_that_of_a_real_run(tmp_path):
    """In batches whose activations are most of it: what convolutions keep once is not planned, 30 MB."""
    given = [
        "model=tiny_diffusion",
        "model.pretrained=false",
        "data=dreambooth",
        f"data.root={drawing.subject(tmp_path)}",
    ]
    given += ["data.prior=0", "data.batch_size=64", "method=full", "sample.seeds=[]", "trainer=cpu", "trainer.epochs=1"]
    given += ["trainer.progress=false"]
    told = plan_run.rehearse(spec(*given), plan_devices.find("here", "cpu", timed=False))
    assert told.largest.bytes == pytest.approx(own_peak(tmp_path, given), rel=0.15)
