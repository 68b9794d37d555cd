"""A plan before the run: what it takes, whether it fits, and what is refused."""

import json
import subprocess
import sys

import pytest
import torch
from hydra import compose, initialize_config_dir

from helpers import CONF, ROOT, refusal
from helpers.command import line, own_peak
from recombine import data, models
from recombine.core import footprint, memory, remembered, rewrite
from recombine.core.calibration import collect
from recombine.methods.from_config import from_name
from recombine.runner import arguments, limits, plan, plan_devices, plan_player, plan_run, ranks
from recombine.runner.config import resolve
from recombine.runtime import conf
from recombine.training import objectives

TINY = ("model=tiny_vit", "data.limit=64", "trainer=cpu")
BATCH = {key: torch.zeros(2, 16, dtype=torch.long) for key in ("input_ids", "labels")}


def spec(*typed):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return resolve(compose("config", [*typed]))


def device(memory=10**12, gpu=True) -> plan_devices.Device:
    return plan_devices.Device("a test's", memory, {torch.float32: 1e12}, 1e11, 1e10, gpu)


def test_stage_plan_stands_beside_the_stage_that_is_planned():
    typed = ["stage=joint", "stage=plan", "stage.device=here", "stage.distil.epochs=2"]
    beside = ["stage=joint", "stage@plan=plan", "plan.device=here", "stage.distil.epochs=2"]
    assert arguments.planned(typed) == beside
    assert arguments.planned(["stage=adapt", "stage.device=here"]) == ["stage=adapt", "stage.device=here"]


def test_products_bytes_and_factorisations_are_counted():
    a, b = torch.empty(8, 4, device="meta"), torch.empty(4, 16, device="meta")
    watch = footprint.Watch([a, b])
    with watch:
        c = a @ b
        d = c + c
        del c
        torch.linalg.svd(a.double(), full_matrices=False)
    assert watch.products == {torch.float32: 2 * 8 * 4 * 16} and watch.factoring == 6 * 8 * 16 + 20 * 64
    assert watch.live == a.nbytes + b.nbytes + d.nbytes and watch.peak >= watch.live + d.nbytes


def test_attention_keeps_no_matrix_of_tokens_by_tokens():
    q = torch.empty(1, 2, 512, 8, device="meta", requires_grad=True)
    for kernels, least in ((footprint.Kernels(), False), (footprint.Kernels(torch.bfloat16, True), False)):
        watch = footprint.Watch([q])
        with watch, kernels:
            y = torch.nn.functional.scaled_dot_product_attention(q, q, q)
            y.sum().backward()
        assert (watch.peak > 2 * 512 * 512 * 4) is least


@pytest.mark.parametrize(
    "kinds", [{"inputs"}, {"inputs", "outputs"}, {"magnitudes"}, {"inputs", "mean"}, {"fisher"}, {"inputs", "cross"}]
)
def test_statistics_in_closed_form_are_those_that_calibration_holds(kinds):
    model = models.build(**conf.load("model", "tiny_llama"))
    sites = rewrite.find_sites(model, from_name("svd", {}, "method"))
    loss = objectives.LanguageModel()
    stats = collect(model, sites, lambda: [loss.loss(model, BATCH)[0]], kinds)
    held = {}
    for layer in stats.values():
        for value in (layer.gg, layer.gx, layer.fisher, layer.inputs.xx, layer.inputs.mean, layer.inputs.absolute):
            held |= {id(value): value.nbytes} if isinstance(value, torch.Tensor) else {}
    batch = sum(site.module.weight.numel() for site in sites) * bool(kinds & {"cross", "fisher"})  # of one batch, gone
    assert memory.sums(sites, kinds) - 8 * batch == sum(held.values())


@pytest.mark.parametrize("method", ["lora", "crisp", "cersa", "svd_llm", "jactus", "ssf"])
def test_what_is_rehearsed_is_what_the_method_stores_and_trains(method):
    """JACTUS divides its budget evenly here, CERSA takes the largest ranks that there can be; the others are exact."""
    budget = ["budget=retained_60"] if method in ("svd_llm", "jactus") else []
    found = spec(*TINY, f"method={method}", *budget, "method.chunk=16" if method == "crisp" else "seed=0")
    told = plan_run.rehearse(found, device(gpu=False))
    assert not told.notes and {"load", "train", "test"} <= {phase.name for phase in told.phases}
    module = data.build(**found.data)
    model = models.build(**found.model, num_classes=module.num_classes)
    module.attach_model(**models.for_data(model.recombine_source))
    pixels = torch.zeros(4, 3, module.image_size, module.image_size)
    objective = objectives.Classification(module.num_classes)
    losses = lambda: [objective.loss(model, (pixels.normal_(), torch.zeros(4, dtype=torch.long)))[0]]  # noqa: E731
    rewrite.apply(model, found.method, found.budget, losses)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in footprint.trained(model))
    if method in ("jactus", "cersa"):
        assert told.parameters["trained"] >= (0.5 if method != "cersa" else 1) * trained
        assert told.parameters["total"] == pytest.approx(total, rel=0.4)
    else:
        assert told.parameters == {"total": total, "trained": trained}


def test_a_deep_model_is_rehearsed_with_a_few_blocks(monkeypatch):
    deep = spec(*TINY, "model.depth=9", "stage=joint", "method=svd", "method.train_core=true", "budget=retained_50")
    line = plan_run.rehearse(deep, device())
    monkeypatch.setattr(plan_run, "FEW", 99)
    whole = plan_run.rehearsed(deep, device())
    assert line.parameters == whole.parameters and line.changed == whole.changed
    for a, b in zip(line.phases, whole.phases, strict=True):
        assert a.name == b.name and a.bytes == pytest.approx(b.bytes, rel=0.03)
        assert sum(a.cost.products.values()) == pytest.approx(sum(b.cost.products.values()), rel=0.03)


@pytest.mark.parametrize(("name", "copies"), [("adamw", 2), ("muon", 2), ("sgd", 1), ("adamw_8bit", 0.5)])
def test_moments_are_the_optimizers(name, copies):
    found = spec(*TINY, "method=full", "probe=false", f"optim={name}")
    held = next(phase.held for phase in plan_run.rehearse(found, device()).phases if phase.name == "train")
    assert held["optimizer"] == pytest.approx(copies * held["gradients"], abs=1)
    plan.at_start(found)


def test_the_file_of_the_weights_is_read_beside_a_gpu():
    """A processor holds both, unless the file is mapped."""
    run = spec("model=vit_s16", "data=vtab", "data.task=dtd", "method=lora", "stage=adapt", "trainer=cpu")
    beside, both = (plan_run.rehearsed(run, device(gpu=gpu)).phases[0] for gpu in (True, False))
    assert beside.name == both.name == "load" and beside.held["weights"] == both.held["file"]
    assert set(beside.held) == {"weights"}


def test_shards_lie_beside_a_whole_copy_and_gradients_are_divided():
    one, two = (
        {phase.name: phase.held for phase in plan_run.rehearse(spec(*TINY, "method=full", *typed), device()).phases}
        for typed in (["data.batch_size=8"], ["data.batch_size=16", "trainer=fsdp", "trainer.devices=2"])
    )
    train = two["train"]
    assert train["weights"] == pytest.approx(1.5 * one["train"]["weights"], abs=2)
    assert train["gradients"] * 2 == pytest.approx(one["train"]["gradients"], abs=2)
    assert two["test"]["weights"] == one["test"]["weights"]


def test_recomputed_blocks_keep_fewer_activations():
    whole, recomputed = (
        {phase.name: phase.held for phase in plan_run.rehearse(spec(*TINY, *typed, "method=lora"), device()).phases}
        for typed in (["seed=0"], ["trainer.gradient_checkpointing=true"])
    )
    assert recomputed["train"]["activations"] < 0.8 * whole["train"]["activations"]
    assert recomputed["test"] == whole["test"]


def test_what_values_decide_is_planned_by_bounds():
    told = plan_run.rehearse(spec(*TINY, "method=dobi_svd", "budget=retained_60"), device())
    assert "dobi_svd: what it stores and trains is learnt" in told.notes[0]


def test_ranks_that_are_measured_are_planned_by_bounds_in_a_deep_model(monkeypatch):
    """Of few blocks they can be rehearsed, of twice as many not: both follow the bounds."""
    deep = ("model=tiny_llama", "model.num_hidden_layers=12", "data=text", "data.limit=64", "trainer=cpu")
    found = spec(*deep, "stage=retrofit", "method=svd_llm", "method.allocation=lems")
    monkeypatch.setattr(plan_player, "LEARN", set())
    whole = plan_run.rehearsed(found, device())
    assert whole.phases[-1].name == "compare" and not whole.notes
    monkeypatch.setattr(footprint, "MOST", 15_000)
    told = plan_run.rehearsed(found, device())
    assert told.phases[-1].name == "compare" and any("is learnt" in note for note in told.notes)


def test_the_verdict_names_what_makes_it_fit():
    run = spec("model=tiny_llama", "data=text", "method=full", "data.limit=64", "data.batch_size=64")
    needs = plan.plan(run, device())
    assert needs.verdict == "fits" and needs.least < needs.peak
    less = plan.plan(run, device(int(needs.peak * 0.6)))
    assert less.verdict.startswith("does not fit") and "model.gradient_checkpointing=true" in less.verdict
    held = needs.told.largest.held
    divided = sum(held[part] for part in plan.LEAST[:3])
    big = spec("model=tiny_llama", "data=text", "method=full", "data.batch_size=1", "data.max_length=8", "probe=false")
    needs = plan.plan(big, device())
    assert divided and "2 GPUs of 1 MB: trainer=fsdp" in plan.plan(big, device(int(needs.peak * 0.9))).verdict


def test_one_run_writes_its_plan(tmp_path, capsys):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [*TINY, "method=lora", "stage@plan=plan", "plan.device=a100_40gb"])
    ranks.main(cfg, tmp_path)
    told, shown = json.loads((tmp_path / "plan.json").read_text()), capsys.readouterr().out
    assert told["verdict"] == "fits" and told["device"]["name"] == "a100_40gb" and told["gpu_hours"] > 0
    assert {"weights", "gradients", "optimizer", "activations"} <= told["phases"]["train"].keys()
    assert "verdict" in shown and "fits" in shown and [*tmp_path.iterdir()] == [tmp_path / "plan.json"]


def test_a_device_that_is_not_known(capsys, monkeypatch, tmp_path):
    said = line(capsys, monkeypatch, tmp_path, "method=lora", "stage=plan", "stage.device=h100")
    assert "stage.device=h100: there is no such device; did you mean h100_80gb" in said and "rtx4090_24gb" in said


def test_pictures_that_the_model_cannot_read_are_refused_as_in_a_run():
    said = refusal(plan_run.rehearse, spec(*TINY, "method=lora", "data.image_size=3"), device())
    assert "data.image_size=3: the model reads pictures of 32 x 32" in said


def test_a_grid_is_one_table(tmp_path):
    command = [sys.executable, "run.py", "-m", *TINY, "method=lora,svd", "seed=0,1", "stage=plan", "stage.device=here"]
    done = subprocess.run(
        [*command, f"hydra.sweep.dir={tmp_path}/out"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rows = [row.split() for row in done.stdout.splitlines()]
    assert [(row[0], row[1], row[-1]) for row in rows[2:] if row] == [("2", "lora", "fits"), ("2", "svd", "fits")]
    assert not (tmp_path / "out").exists() or not [*(tmp_path / "out").rglob("*.json")]


def test_what_cannot_fit_is_refused_at_the_start(monkeypatch, capsys):
    plan.at_start(run := spec(*TINY, "method=lora"))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(limits, "memory", lambda: 2 * 10**5)
    assert "model=tiny_vit: 461 kB" in refusal(plan.at_start, run) or "of weights do not fit" in refusal(
        plan.at_start, run
    )
    monkeypatch.setattr(limits, "memory", lambda: 10**6)
    assert "of gradients" in refusal(plan.at_start, spec(*TINY, "method=full", "probe=false"))


def test_a_long_run_says_its_plan(monkeypatch, capsys):
    slow = device(gpu=False)
    monkeypatch.setattr(plan, "find", lambda *given, **more: slow)
    monkeypatch.setattr(plan, "LONG", 1e-6)
    plan.at_start(spec(*TINY, "method=lora"))
    assert capsys.readouterr().err.startswith("plan: ")


def test_ways_out_keep_what_is_computed_first():
    keys = [key for key, _ in plan.ways(spec("model=tiny_llama", "data=text", "method=lora"), device())]
    assert keys[0] == "model.gradient_checkpointing=true" and keys[-1].endswith("model.dtype=bfloat16")


PICTURES = ["model=dinov2_s14", "model.image_size=140", "data.task=fashion_mnist", "data.limit=32"]
PICTURES += ["data.batch_size=16"]
WINDOWS = ["model=smollm2_135m", "data=text", "data.limit=8", "data.max_length=128", "calibration.samples=8"]
WINDOWS += ["calibration.batch_size=4", "stage=retrofit", "budget=retained_70"]
TEXTS = ["model=minilm", "data=sentences", "data.limit=128", "data.max_length=32", "data.batch_size=64"]
SIX = {
    "pictures, lora": [*PICTURES, "method=lora"],
    "pictures, crisp": [*PICTURES, "method=crisp"],
    "pictures, full": [*PICTURES, "method=full"],
    "texts, full": [*TEXTS, "method=full"],
    "windows, svd": [*WINDOWS, "method=svd"],
    "windows, svd_llm": [*WINDOWS, "method=svd_llm"],
}


@pytest.mark.full
@pytest.mark.parametrize("given", SIX.values(), ids=SIX)
def test_the_peak_is_that_of_a_real_run(tmp_path, given):
    """experiments/scale/plan.md has the numbers."""
    given = [*given, "trainer=cpu", "trainer.epochs=1", "trainer.progress=false", "probe=false"]
    told = plan_run.rehearse(spec(*given), plan_devices.find("here", "cpu", timed=False))
    assert told.largest.bytes == pytest.approx(own_peak(tmp_path, given), rel=0.15)


def test_what_is_remembered_of_operations_changes_no_plan(monkeypatch):
    run = spec(*TINY, "stage=joint", "method@compressor=svd_llm", "method=lora", "budget=retained_60")
    twice = [plan_run.rehearsed(run, device()) for _ in range(2)]  # the second finds all operations known
    monkeypatch.setattr(remembered, "call", lambda func, args, kwargs, given: func(*args, **kwargs))
    assert twice[0] == twice[1] == plan_run.rehearsed(run, device())


def test_numbers_of_two_types_are_two_operations():
    x = torch.ones(3, dtype=torch.long, device="meta")
    with footprint.Watch([x]):
        found = [(x * 1).dtype, (x * 1.0).dtype, (x * True).dtype, (x * 1.0).dtype]
    assert found == [torch.long, torch.float32, torch.long, torch.float32]


def test_runs_that_take_the_same_share_one_rehearsal():
    def same(*typed):
        run = ("model=tiny_vit", "data=vtab", "data.task=dsprites_ori", "method=lora", "trainer=cpu")
        one, other = (spec(*run, *more) for more in (typed, ()))
        return plan_run.rehearse(one, device()) is plan_run.rehearse(other, device())

    alike = ("seed=3", "optim.lr=1e-5", "method.lr=1e-5", "optim.schedule=linear", "data.task=dsprites_loc seed=1")
    assert all(same(*typed.split()) for typed in alike)
    others = ("method.rank=3", "data.task=dtd", "data.batch_size=3", "trainer.epochs=3", "optim=sgd", "stage=retrofit")
    assert not any(same(typed) for typed in others)
    assert plan_run.rehearse(spec(*TINY), device()) is not plan_run.rehearse(spec(*TINY), device(10**11))


def test_samples_are_known_before_the_data_are():
    sizes = {task: data.build("vision8", task=task, batch_size=1).foreseen for task in ("dtd", "eurosat")}
    assert sizes["dtd"] == {"train": 3384, "val": 376, "test": 1880}
    assert sizes["eurosat"] == {"train": 16200, "val": 5400, "test": 5400}
    last = data.build("vision8", task="dtd", select="last", split="80/20", limit=4000)
    assert last.foreseen == {"train": 4000, "test": 1128}
    assert data.build("glue", task="mrpc").foreseen == {"train": 3301, "val": 367, "test": 408}
    assert data.build("text", task="wiki").foreseen == {}
