"""The analyses after a stage, against numpy."""

import copy

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

import recombine
from helpers import QKV
from recombine import Cersa, Full, Jactus, Peft, UsageError, models
from recombine.evaluation import linear_probe, subspaces
from recombine.models import roles
from recombine.models.roles import layer_at
from recombine.runner import pipeline, ranks
from recombine.runner.config import resolve
from recombine.runner.grid import CONF
from recombine.stages import analysis
from zoo import build as zoo
from zoo import losses


def principal(weight, energy):
    """The oracle: U and V of the smallest rank that holds the energy."""
    u, s, vh = np.linalg.svd(weight.detach().double().numpy(), full_matrices=False)
    k = int(np.searchsorted(np.cumsum(s**2), energy * np.sum(s**2)) + 1)
    return u[:, :k], vh[:k].T


def psi(a, b):
    return np.linalg.norm(a.T @ b) ** 2 / min(a.shape[1], b.shape[1])


def test_overlaps_are_equation_3_for_all_ranks():
    generator = np.random.default_rng(0)
    a, b = (np.linalg.qr(generator.normal(size=(9, 6)))[0] for _ in range(2))
    found = subspaces.overlaps(torch.tensor(a), torch.tensor(b)).numpy()
    for i in range(1, 7):
        for j in range(1, 7):
            assert found[i - 1, j - 1] == pytest.approx(psi(a[:, :i], b[:, :j]), abs=1e-12)
    assert np.allclose(subspaces.overlaps(torch.tensor(a), torch.tensor(a)), 1)  # the smaller span lies in the larger


@pytest.mark.parametrize("arch", ["tiny_vit", "tiny_deberta"])
def test_subspaces_of_full_fine_tuning(arch):
    original, model = zoo(arch), recombine.apply(zoo(arch), Full(targets=QKV))
    same = subspaces.subspaces(original, model, 0.95)
    assert same["u"] == pytest.approx(dict.fromkeys(QKV, 1.0)) == same["v"]
    torch.manual_seed(3)
    for name in model.recombined.targets:
        weight = model.get_submodule(name).weight
        weight.data += 0.5 * weight.std() * torch.randn_like(weight)
    found = subspaces.subspaces(original, model, 0.9, points=5)
    assert set(found["map_u"]) == {"layer 0", "layer 1", "layer 3"}  # of four
    for role in QKV:
        pairs = [
            (layer_at(original, name).weight, model.get_submodule(name).weight)
            for name, played in model.recombined.targets.items()
            if played == role
        ]
        scores = [[psi(*sides) for sides in zip(*(principal(w, 0.9) for w in pair), strict=True)] for pair in pairs]
        assert [found["u"][role], found["v"][role]] == pytest.approx(np.mean(scores, 0).tolist(), abs=1e-9)
        assert found["u"][role] < 0.99
        for key, side in (("map_u", 0), ("map_v", 1)):
            a, b = (principal(weight, 1 - 1e-15)[side] for weight in pairs[1])
            rank = min(pairs[1][0].shape)
            wanted = [[psi(a[:, :i], b[:, :j]) for i in (1, round(1 + (rank - 1) / 4))] for j in (1, rank)]
            shown = np.array(found[key]["layer 1"][role])[[0, -1], :2]
            assert shown == pytest.approx(np.array(wanted), abs=1e-9)


@pytest.mark.parametrize("method", [Cersa(alpha=0.8), Peft(rank=4), Jactus(targets=QKV, ratio=0.6)], ids=str)
def test_subspaces_are_those_of_what_the_adapted_layer_applies(method):
    original = zoo("tiny_vit")
    model = copy.deepcopy(original)
    recombine.apply(model, method, losses=losses(model))
    torch.manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = subspaces.subspaces(original, model, 0.95)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    merged = recombine.merge(copy.deepcopy(model))
    roles.split_fused(merged, QKV)
    for role in QKV:
        names = [name for name, played in model.recombined.targets.items() if played == role]
        pairs = [[principal(layer_at(m, n).weight, 0.95) for m in (original, merged)] for n in names]
        assert found["u"][role] == pytest.approx(np.mean([psi(a[0], b[0]) for a, b in pairs]), abs=1e-5)
        assert found["v"][role] == pytest.approx(np.mean([psi(a[1], b[1]) for a, b in pairs]), abs=1e-5)


def test_forgetting_is_the_share_of_the_mean_accuracy_that_is_lost():
    assert analysis.forgetting({"a": 0.8, "b": 0.4}, {"a": 0.5, "b": 0.4}) == pytest.approx(0.25)
    assert analysis.forgetting({"a": 0.5}, {"a": 0.6}) == pytest.approx(-0.2)


def run(tmp_path, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", ["model=tiny_vit", "trainer=cpu", "trainer.progress=false", "probe=false", *overrides])
    ranks.main(cfg, tmp_path)
    return cfg, pipeline.results.read(tmp_path / "result.json")


def test_a_run_with_every_analysis(tmp_path):
    tasks = "analyse.elsewhere=[dsprites_loc,clevr_count,snorb_elev]"
    small = ["data.limit=48", "trainer.epochs=2", "method=cersa", "method.alpha=0.9"]
    cfg, found = run(tmp_path, tasks, *small, "analyse.subspaces=0.9", "analyse.maps=3")
    elsewhere = found["elsewhere"]
    assert set(elsewhere["before"]) == set(elsewhere["after"]) == {"clevr_count", "snorb_elev"}  # not the run's own
    assert elsewhere["forgetting"] == pytest.approx(
        1 - np.sum(list(elsewhere["after"].values())) / np.sum(list(elsewhere["before"].values()))
    )
    torch.manual_seed(0)
    pipeline.L.seed_everything(cfg.seed, verbose=False)
    pretrained = models.build(**cfg.model)
    data = pipeline.data.build(**{**cfg.data, "task": "snorb_elev"}, seed=cfg.seed)
    data.attach_model(**models.for_data(pretrained.recombine_source))
    data.prepare_data()
    data.setup()
    models.reset_head(pretrained, 3)  # of whatever task: its inputs count
    assert elsewhere["before"]["snorb_elev"] == pytest.approx(linear_probe.fit(pretrained.eval(), data).test)

    n, layers = 48, found["layers"]
    memory = sum(2 * n * row["rank"] + 4 * row["rank"] ** 2 for row in layers) / (n * n * len(layers))
    assert found["memory_rate"]["targets"] == pytest.approx(memory)
    account = found["account"]
    total = (account["stored"] + 3 * account["trained"]) / (account["stored"] / account["retained_total"])
    assert found["memory_rate"]["model"] == pytest.approx(total)
    assert found["images_per_second"] == pytest.approx(2 * 48 / found["seconds"]["train_best"])
    assert np.array(found["subspaces"]["map_v"]["layer 1"]["k"]).shape == (3, 3)


def test_nothing_is_compared_unless_asked(tmp_path):
    _, found = run(tmp_path, "data.limit=8", "stage=retrofit", "method=lora", "method.rank=2")
    assert "subspaces" not in found and "elsewhere" not in found and "images_per_second" not in found
    assert found["memory_rate"]["targets"] == pytest.approx((48 * 48 + 4 * 2 * 96) / (48 * 48))
    _, found = run(tmp_path / "full", "data.limit=8", "stage=retrofit", "method=full")
    assert found["memory_rate"] == pytest.approx({"targets": 4, "model": 4})  # Tab. 1's 4 mn


@pytest.mark.parametrize("override, why", [
    ("analyse.subspaces=1.5", "a number above 0 to 1"),
    ("analyse.maps=0", "a whole number from 1"),
    ("analyse.elsewhere=[clevr]", r"analyse.elsewhere=\[clevr\]: data.task=clevr: there is no such task"),
])  # fmt: skip
def test_bad_keys_are_refused_before_the_work(tmp_path, override, why):
    with pytest.raises(UsageError, match=why):
        run(tmp_path, "data.limit=8", "stage=retrofit", "method=cersa", override)


def test_a_task_without_classes_cannot_be_probed():
    pytest.importorskip("diffusers")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(
            "config", ["model=tiny_diffusion", "data=captions", "data.limit=8", "analyse.elsewhere=[openclipart]"]
        )
    with pytest.raises(UsageError, match="no classes to probe"):
        pipeline.build_transfer_data(resolve(cfg), pipeline.data.build(**cfg.data, seed=0), {})
