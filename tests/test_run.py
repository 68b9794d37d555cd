"""The command line and the stages, on a tiny ViT and generated pictures; and every bad input in one line."""

import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

import recombine
import run
from recombine import models, results
from recombine.data.vision.offline import Offline
from recombine.runner import ranks
from recombine.runner.config import resolve
from recombine.stages.adapt import fit
from recombine.stages.context import RunContext
from recombine.training.objectives import Classification

ROOT = Path(__file__).parents[1]
TINY = ["model=tiny_vit", "trainer=cpu", "trainer.progress=false", "trainer.epochs=2", "data.limit=64", "probe=false"]
CHUNK = "method.chunk=16"


def config(*overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", [*TINY, *overrides])


def execute(folder, *overrides) -> dict:
    ranks.main(config(*overrides), folder)
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("name", ["crisp", "cersa", "svd", "lora", "dora", "full", "linear_probe"])
def test_adapt_with_every_method(name, tmp_path):
    result = execute(tmp_path, f"method={name}", *([CHUNK] if name == "crisp" else []))
    assert 0 <= result["test"]["acc"] <= 1 and 0 <= result["val"]["acc"] <= 1
    account = result["account"]
    assert account["bytes_optimizer"] == 8 * account["trained"] and account["flops"] > 0
    assert result["data"]["sizes"] == {"train": 64, "val": 64, "test": 64} and len(result["data"]["sha256"]) == 3
    assert result["environment"]["versions"]["torch"] and result["command"].startswith("python run.py")
    assert result["layers"] and set(result["seconds"]) >= {"setup", "retrofit", "train_best", "test", "total"}
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_same_seed_same_result(tmp_path):
    first, second, other = (execute(tmp_path / n, CHUNK, f"seed={s}") for n, s in (("a", 3), ("b", 3), ("c", 4)))
    assert first["test"] == second["test"] and first["val"] == second["val"]
    assert torch.equal(*(load_file(tmp_path / n / "best.safetensors")["head.weight"] for n in "ab"))
    assert first["test"]["loss"] != other["test"]["loss"]


def test_the_test_set_sees_the_weights_that_validation_chose(tmp_path):
    """An absurd schedule makes later epochs worse; the tested weights are those of the best epoch."""
    result = execute(tmp_path, "method=full", "optim.lr=1e-3", "optim.schedule=constant", "trainer.epochs=4")
    best = f"stage.checkpoint={tmp_path}/best.safetensors"
    again = execute(tmp_path / "again", "method=full", "stage=evaluate", best)
    assert again["test"]["acc"] == result["test"]["acc"]
    assert again["test"]["loss"] == pytest.approx(result["test"]["loss"], rel=1e-5)


def test_early_stopping_counts_epochs_without_a_better_validation(tmp_path):
    result = execute(tmp_path, "method=linear_probe", "optim.lr_head=1e-12", "trainer.epochs=9", "trainer.patience=2")
    assert result["best_epoch"] == 0 and result["seconds"]["train_best"] > 0
    assert "trainer.patience" not in result["command"]  # composed here, not on a command line


@pytest.mark.parametrize("method", [["method=crisp", "method.chunk=16"], ["method=svd", "method.train_core=true"]])
@pytest.mark.parametrize("stage", ["compress", "joint"])
def test_compress_then_adapt(method, stage, tmp_path):
    result = execute(tmp_path, *method, f"stage={stage}", "budget=retained_50", "probe=true", "stage.distil.epochs=3")
    assert result["account"]["retained"] <= 0.5 and result["distil"]["val_loss"] > 0
    assert (result["account"]["trained_without_head"] == 0) == (stage == "compress")
    # what was distilled came back: the checkpoint alone rebuilds the tested model
    again = execute(tmp_path / "e", *method, "stage=evaluate", f"stage.checkpoint={tmp_path}/best.safetensors")
    assert again["test"]["acc"] == result["test"]["acc"]


def test_distillation_brings_the_student_closer(tmp_path):
    losses = [
        execute(tmp_path / str(e), CHUNK, "stage=compress", "budget=retained_50", f"stage.distil.epochs={e}")["distil"]
        for e in (1, 8)
    ]
    assert losses[1]["val_loss"] < losses[0]["val_loss"]


def test_retrofit_compares_with_the_original(tmp_path):
    result = execute(tmp_path, "stage=retrofit", CHUNK)
    assert max(result["weight_error"].values()) <= 1e-6 and result["logit_error"] <= 1e-3
    assert len(result["weight_error"]) == 16


def test_suite_prints_group_means(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Offline, "suite", dict.fromkeys(["dsprites_loc", "dsprites_ori"], "structured"))
    mean = ranks.main(config("data.task=all", "method=linear_probe"), tmp_path)
    summary = json.loads((tmp_path / "suite.json").read_text())
    assert summary["complete"] and list(summary["tasks"]["structured"]) == ["dsprites_loc", "dsprites_ori"]
    assert summary["mean"] == pytest.approx(sum(summary["tasks"]["structured"].values()) / 2) and 0 <= mean <= 1
    assert summary["mean_of_tasks"] == summary["mean"]
    out = capsys.readouterr().out
    assert "\nlinear_probe on tiny_vit, data offline, test scores of 2 tasks in %\n" in out
    assert "mean of structured" in out
    assert (tmp_path / "dsprites_ori" / "result.json").exists()


def test_linear_probe_is_the_optimum_that_scipy_finds():
    from recombine.evaluation.linear_probe import regress

    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 12, generator=g, dtype=torch.float64), torch.randint(4, (300,), generator=g)
    xn, hot = x.numpy(), np.eye(4)[y.numpy()]

    def objective(flat):
        w, b = flat[:48].reshape(4, 12), flat[48:]
        p = scipy.special.softmax(xn @ w.T + b, 1)
        slope = (p - hot) / 300
        value = -np.log((p * hot).sum(1)).mean() + 1e-2 * (w**2).sum()
        return value, np.concatenate([(slope.T @ xn + 2e-2 * w).ravel(), slope.sum(0)])

    best = scipy.optimize.minimize(objective, np.zeros(52), jac=True, method="BFGS", options={"gtol": 1e-9})
    w, b = regress(x, y, 4, decay=1e-2)
    assert torch.allclose(w, torch.from_numpy(best.x[:48].reshape(4, 12)), atol=1e-5)
    assert objective(np.concatenate([w.numpy().ravel(), b.numpy()]))[0] <= best.fun + 1e-9


# Bad input: one line with the value, the reason and the fix


def line(capsys, monkeypatch, tmp_path, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["run.py", f"hydra.run.dir={tmp_path}/out", *TINY, *arguments])
    monkeypatch.setattr(run, "DEBUG", False)
    assert run.cli() == 2
    err = [text for text in capsys.readouterr().err.splitlines() if text.strip() and "img/s" not in text]
    assert len(err) == 1 and err[0].startswith("run.py: "), err
    assert not (tmp_path / "out" / "result.json").exists()
    return err[0]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["method=crips"], ["method=crips", "did you mean crisp?", "lora"]),
        (["experiment=strt"], ["experiment=strt", "did you mean start?", "--help"]),
        (["metod.chunk=16"], ["metod.chunk", "did you mean method?"]),
        (["method.chnk=16"], ["method.chnk", "did you mean chunk?", "+method.chnk=16"]),
        (["method.chunk"], ["method.chunk=..."]),
        (["model=vit_s"], ["vit_s", "vit_s16", "dinov2_s14"]),
        (["data=vtabb"], ["vtabb", "offline", "folder"]),
        (["budget=retained_0"], ["retained_0", "more than 0"]),
        (["budget=retained_500"], ["retained_500", "at most 100"]),
        (["budget=retaind_50"], ["retaind_50", "did you mean budget=retained_50"]),
        (["budget=half"], ["half", "none, retained_50, trainable_150k, energy_95, memory_1200mb"]),
        (["stage=adaptt"], ["adaptt", "adapt", "joint"]),
        (["data.task=dsprite_loc"], ["dsprite_loc", "dsprites_loc"]),
        (["method.basis_rank=0", CHUNK], ["basis_rank=0", "from 1 to"]),
        (["method.basis_rank=eight", CHUNK], ["basis_rank", "eight"]),
        (["method.basis_rank=2.5", CHUNK], ["basis_rank", "2.5"]),
        (["method.basis_rank=1000", CHUNK], ["basis_rank=1000", "32"]),
        (["method.chunk=7"], ["chunk=7", "48", "divide"]),
        (["method=cersa", "method.alpha=1.2"], ["alpha=1.2", "(0, 1]"]),
        (["method=cersa", "method.alpha=0.8", "method.beta=0.9"], ["beta=0.9", "0.8"]),
        (["+method.rnak=3"], ["rnak", "chunk"]),
        (["method.rnak=3"], ["rnak"]),
        (["method=svd", "budget=retained_0.01"], ["retained_0.01", "nearest", "retained_"]),
        (["method=lora", "budget=retained_50"], ["retained_50", "trainable"]),
        (["budget=retained"], ["size is missing", "retained_50"]),
        (["budget=retained", "budget.value=0.37"], ["budget.value=0.37", "budget=retained_37"]),
        (["optim.name=sdg", CHUNK], ["sdg", "adamw, adam, sgd"]),
        (["method.targets=[gate]", CHUNK], ["gate", "qkv"]),
        (["stage=joint", "method=lora"], ["joint", "does not compress"]),
        (["stage=evaluate"], ["stage.checkpoint"]),
        (["stage=evaluate", "stage.checkpoint=nowhere.safetensors"], ["nowhere.safetensors", "no such file"]),
        (["optim.schedule=exp", CHUNK], ["exp", "cosine"]),
        (["optim.head=zero", CHUNK], ["zero", "probe"]),
        (["optim.lr=fast", CHUNK], ["optim.lr=fast", "number"]),
        (["trainer.epochs=0", CHUNK], ["trainer.epochs=0", "from 1"]),
        (["trainer.patience=0", CHUNK], ["trainer.patience=0", "null"]),
        (["trainer.precision=7", CHUNK], ["trainer.precision=7", "bf16-mixed"]),
        (["trainer.accelerator=abacus", CHUNK], ["trainer", "abacus"]),
        (["data.batch_size=big", CHUNK], ["batch_size", "big"]),
        (["data.task=all", "stage=retrofit", CHUNK], ["data.task=all", "retrofit"]),
        (["method=svd", "method.rank=4", "budget=energy_95"], ["method.rank=4", "energy_95", "drop"]),
        (["data=folder", "data.root=nowhere", "data.task=null"], ["nowhere"]),
        (["data=folder"], ["data.root"]),
        (["data=folder", "data.root=2024"], ["no folder 2024"]),
        (["+tariner.epochs=3", CHUNK], ["tariner", "did you mean trainer"]),
        (["=3"], ["command line"]),
        (["~method"], ["method=None", "group of keys"]),
        (["model=null"], ["command line"]),
        (["analyse=null", CHUNK], ["analyse=None", "group of keys"]),
        (["stage=joint", "stage.distil=3", CHUNK], ["stage.distil=3", "group of keys"]),
        (["stage=profile", "stage.reference=lora", CHUNK], ["stage.reference=lora", "group of keys"]),
        (["trainer.checkpoint_minutes=soon", CHUNK], ["checkpoint_minutes=soon", "a number"]),
        (["trainer.devices=99", CHUNK], ["trainer.devices=99", "cores"]),
        (["optim.clip=tight", CHUNK], ["optim.clip=tight", "a number or null"]),
        (["harness.tasks=piqa", CHUNK], ["harness.tasks=piqa", "a list or null"]),
        (["analyse.elsewhere=dsprites_ori", CHUNK], ["analyse.elsewhere=dsprites_ori", "a list"]),
        (["stage=evaluate", "stage.checkpoint=3", CHUNK], ["stage.checkpoint=3", "no such file"]),
        (["method._target_=null"], ["method._target_=None", "module.Class"]),
        (["method._target_=Mine"], ["method._target_=Mine", "module.Class"]),
        (["method._target_=recombine.methods.cersa.Cersa.inner"], ["Cersa.inner"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and "=" in value[0] else "",
)
def test_bad_input_is_one_line(arguments, words, capsys, monkeypatch, tmp_path):
    message = line(capsys, monkeypatch, tmp_path, *arguments)
    for word in words:
        assert word in message, message


def test_divergence_names_the_step_and_the_last_good_checkpoint(tmp_path, capsys, monkeypatch):
    message = line(capsys, monkeypatch, tmp_path, CHUNK, "optim.lr=1e35", "optim.clip=null")
    assert "step" in message and "diverged" in message and "optim.lr" in message

    @dataclass(kw_only=True)
    class Explodes(recombine.LinearProbe):
        steps: int = 0

        def penalty(self, model):
            self.steps += 1
            return float("nan") if self.steps > 3 else 0.0  # two steps an epoch: in the second

    cfg = config("method=linear_probe", "data.limit=64")
    spec = resolve(cfg)
    data = recombine.data.build("offline", task="dsprites_loc", image_size=32, limit=64, mean=[0.5] * 3, std=[0.5] * 3)
    data.prepare_data()
    data.setup()
    model = models.build("tiny_vit", arch="vit_tiny_patch16_224", pretrained=False, image_size=32, num_classes=16)
    rewritten = recombine.apply(model, Explodes())
    work = RunContext(spec.settings, tmp_path, tmp_path / ".state", rewritten, Explodes(), recombine.Budget(), data)
    with pytest.raises(recombine.UsageError, match=r"step 3 \(epoch 1\).*last good checkpoint is .*best.safetensors"):
        fit(work, Classification(16), spec.settings.optim, 5, "best", work.method)
    assert (tmp_path / "best.safetensors").exists()


def checkpoint(tmp_path):
    torch.manual_seed(0)
    model = models.build("tiny_vit", arch="vit_tiny_patch16_224", pretrained=False, image_size=32, num_classes=3)
    model = recombine.apply(model, recombine.Cersa())
    return recombine.save(model, tmp_path / "good.safetensors")


def fresh(seed=0, arch="vit_tiny_patch16_224", **more):
    torch.manual_seed(seed)
    return models.build("tiny_vit", **{"arch": arch, "pretrained": False, "image_size": 32, "num_classes": 3, **more})


def test_bad_checkpoints_are_one_line(tmp_path):
    path = checkpoint(tmp_path)
    assert recombine.load(path, fresh())
    whole = path.read_bytes()
    (tmp_path / "truncated").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "garbage").write_bytes(b"\x93NUMPY" * 100)
    (tmp_path / "empty").write_bytes(b"")
    save_file({"a": torch.zeros(2)}, tmp_path / "plain")
    for name, word, model in [
        ("truncated", "truncated or corrupted", fresh()),
        ("garbage", "truncated or corrupted", fresh()),
        ("empty", "truncated or corrupted", fresh()),
        ("missing", "no such file", fresh()),
        ("plain", "not a checkpoint of recombine", fresh()),
        ("good.safetensors", "differs from the backbone", fresh(seed=1)),
        ("good.safetensors", "in this model", fresh(arch="vit_small_patch16_224")),
        ("good.safetensors", "VisionTransformer", fresh(arch="swin_tiny_patch4_window7_224", image_size=224)),
    ]:
        with pytest.raises(recombine.UsageError) as error:
            recombine.load(tmp_path / name, model)
        assert word in str(error.value) and "\n" not in str(error.value), error.value


def test_evaluate_refuses_a_task_with_other_classes(tmp_path, capsys, monkeypatch):
    execute(tmp_path, "method=linear_probe")
    best = f"stage.checkpoint={tmp_path}/best.safetensors"
    message = line(capsys, monkeypatch, tmp_path / "x", "stage=evaluate", best, "data.task=snorb_elev", CHUNK)
    assert "16 classes" in message and "9" in message


def test_save_keeps_what_the_user_unfroze(tmp_path):
    model = recombine.apply(fresh(), recombine.Cersa())
    model.norm.weight.requires_grad_(True)
    with torch.no_grad():
        model.norm.weight.mul_(1.001)
    loaded = recombine.load(recombine.save(model, tmp_path / "m"), fresh())
    assert torch.equal(loaded.norm.weight, model.norm.weight)


def test_a_method_of_the_users_own_is_saved_and_loaded(tmp_path):
    class Mine(recombine.Svd):
        pass

    model = recombine.apply(fresh(), Mine(ratio=0.3))
    assert recombine.load(recombine.save(model, tmp_path / "m"), fresh()).recombined.steps[0][0] == "Mine"


def test_a_checkpoint_adapts_the_head_of_the_model_it_is_loaded_into(tmp_path):
    model = fresh()
    model.reset_classifier(9)
    assert recombine.load(checkpoint(tmp_path), model).head.out_features == 3


def test_full_disk_leaves_nothing_half_written(tmp_path):
    """A limit on the file size stands in for the full disk: the write fails in the middle."""
    path = checkpoint(tmp_path)
    before = path.read_bytes()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    model = recombine.load(path, fresh())
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
        with pytest.raises(recombine.UsageError, match="cannot be written") as error:
            recombine.save(model, path)
        with pytest.raises(recombine.UsageError, match="cannot be written"):
            results.write(tmp_path / "result.json", {"x": "y" * 100_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before and {p.name for p in tmp_path.iterdir()} == {"good.safetensors"}


def test_output_folder_that_cannot_be_made(tmp_path, capsys, monkeypatch):
    (tmp_path / "out").write_text("a file where the folder should be")
    assert str(tmp_path / "out") in line(capsys, monkeypatch, tmp_path, "method=linear_probe")
    with (
        pytest.raises(recombine.UsageError, match="cannot be written"),
        results.lock_folder(tmp_path / "out" / "deeper"),
    ):
        pass


def test_a_finished_run_is_not_run_again_and_no_two_processes_share_a_folder(tmp_path, capsys):
    first = execute(tmp_path, "method=linear_probe")
    capsys.readouterr()
    assert execute(tmp_path, "method=linear_probe", "trainer.progress=true") == first  # how it is shown does not count
    assert "finished before" in capsys.readouterr().out
    with pytest.raises(recombine.UsageError, match=r"another configuration \(optim.lr=None there, 0.1 here\)"):
        execute(tmp_path, "method=linear_probe", "optim.lr=0.1")
    with results.lock_folder(tmp_path / "new"), pytest.raises(recombine.UsageError, match="another process runs here"):
        execute(tmp_path / "new", "method=linear_probe")


def test_help_teaches():
    command = [sys.executable, "run.py", "--help"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for group in ("method: ", "model: ", "data: ", "budget: ", "stage: "):
        assert group in out
    assert out.count("python run.py") >= 5 and "result.json" in out


def test_readme_library_example(tmp_path, monkeypatch):
    """The README's Python block, run as it stands but for the model's pretrained weights."""
    import timm

    blocks = (ROOT / "README.md").read_text().split("```python")[1:]
    code = next(b for b in blocks if "recombine.merge" in b).split("```")[0].replace("pretrained=True", "img_size=32")
    assert "recombine.apply" in code and "recombine.merge" in code
    monkeypatch.chdir(tmp_path)
    g = torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, 3, 32, 32, generator=g), torch.randint(10, (4,), generator=g)) for _ in range(3)]
    scope = {"loader": batches, "timm": timm, "torch": torch}
    exec(code, scope)
    assert type(scope["model"]).__name__ == "VisionTransformer" and not hasattr(scope["model"], "recombined")
    assert (tmp_path / "cersa.safetensors").exists()
