"""Every bad input is one line; a finished run is not run again; --help teaches."""

import shlex
import subprocess
import sys

import pytest
from hydra.core.hydra_config import HydraConfig

import recombine
import run
from helpers import ROOT
from helpers.command import CHUNK, execute, line
from recombine import results
from recombine.errors import as_text


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["method=crips"], ["method=crips", "did you mean crisp?", "lora"]),
        (["experiment=strt"], ["experiment=strt", "did you mean start?"]),
        (["metod.chunk=16"], ["metod.chunk", "did you mean method?"]),
        (["method.chnk=16"], ["method.chnk", "did you mean method.chunk?"]),
        (["method.chunk"], ["method.chunk=..."]),
        (["model=vit_s"], ["vit_s", "vit_s16", "dinov2_s14"]),
        (["data=vtabb"], ["vtabb", "offline", "folder"]),
        (["budget=retained_0"], ["retained_0", "more than 0"]),
        (["budget=retained_500"], ["retained_500", "at most 100"]),
        (["budget=retaind_50"], ["retaind_50", "did you mean budget=retained_50"]),
        (["budget=half"], ["half", "none, retained_50, bytes_50, trainable_150k, energy_95, memory_1200mb"]),
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
        (["method@compressor=nope"], ["method@compressor=nope", "svd_llm"]),
        (["compressor.rank=4"], ["compressor.rank=4", "method@compressor=svd"]),
        (["method@compressor=svd", "compressor.rank=0", "stage=joint"], ["compressor.rank=0"]),
        (["method=svd", "method.rank=4", "method.energy=0.9"], ["method.rank=4 and method.energy=0.9", "drop one"]),
        (["method=lora", "method.targets=[q,q]"], ["method.targets=[q,q]", "names q twice"]),
        (["method=lora", "method.targets=[qvk]"], ["method.targets=[qvk]", "did you mean qkv?"]),
        (["stage=profile", "stage.reference={name:lora,rank:4}"], ["+stage.reference.KEY=VALUE"]),
        (["stage=profile", "stage.reference=null"], ["stage.reference=null", "stage.rounds=0"]),
        (["trainer.accelerator=mps"], ["trainer.accelerator=mps", "auto, or cpu"]),
        (["trainer.strategy=dpp"], ["trainer.strategy=dpp", "did you mean ddp?"]),
        (["trainer.strategy={_target_:os.system}"], ["trainer.strategy._target_=os.system", "Strategy"]),
        (["trainer.devices=[0,0]"], ["trainer.devices=[0,0]", "trainer.devices=2"]),
        (["data.image_size=33", CHUNK], ["data.image_size=33", "32 x 32", "model.image_size=33"]),
        (["model.checkpoint=/etc/hostname"], ["model.checkpoint=/etc/hostname", "no weights file"]),
        (["model=tiny_swin", "model.depths=[1,1,1,1]"], ["model tiny_swin", "depths=(1, 1, 1, 1)"]),
        (["data.mean=[0,0]"], ["data.mean=[0,0]", "three numbers"]),
        (["report=5"], ["report=5", "a group of keys"]),
        (["data=folder", "data.root=/proc/self/fdinfo"], ["data.root", "class"]),
        (["method=svd", "budget=retained_0.01"], ["retained_0.01", "nearest", "retained_"]),
        (["method=lora", "budget=retained_50"], ["retained_50", "lora cannot be held", "trainable"]),
        (["budget=retained"], ["size is missing", "retained_50"]),
        (["budget=retained", "budget.value=0.37"], ["budget.value=0.37", "budget=retained_37"]),
        (["optim.name=sdg", CHUNK], ["sdg", "adamw, adam, sgd"]),
        (["method.targets=[gate]", CHUNK], ["gate", "qkv"]),
        (["stage=joint", "method=lora"], ["joint", "does not compress"]),
        (["logger=wandb", "logger.project=a/b"], ["logger.project=a/b", "characters without /"]),
        (["method=pc_lora"], ["stage=adapt: pc_lora takes its form in a distillation", "stage=joint"]),
        (["method@compressor=pc_lora", "method=lora"], ["stage=adapt: pc_lora takes its form in a distillation"]),
        (["method=lora", "export=lora"], ["export=lora", "pretrained weights", "export=hf"]),
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
        (["data=folder", "data.root=2024"], ["data.root=2024", "no folder 2024"]),
        (["+tariner.epochs=3", CHUNK], ["tariner", "did you mean trainer"]),
        (["=3"], ["=3", "say key=value"]),
        (["~method"], ["~method", "no key can be taken away", "crisp"]),
        (["model=null"], ["model=null", "one of", "dinov2_s14"]),
        (["analyse=null", CHUNK], ["analyse=null", "group of keys"]),
        (["stage=joint", "stage.distil=3", CHUNK], ["stage.distil=3", "group of keys"]),
        (["stage=profile", "stage.reference=lora", CHUNK], ["stage.reference=lora", "group of keys"]),
        (["trainer.checkpoint_minutes=soon", CHUNK], ["checkpoint_minutes=soon", "a number"]),
        (["trainer.devices=99", CHUNK], ["trainer.devices=99", "cores"]),
        (["optim.clip=tight", CHUNK], ["optim.clip=tight", "a number above 0 to 1e6, or null"]),
        (["harness.tasks=piqa", CHUNK], ["harness.tasks=piqa", "a list of words, or null; say harness.tasks=[piqa]"]),
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


def test_a_run_that_ctrl_c_ended_says_its_folder(capsys, monkeypatch, tmp_path):
    """What it says can be typed, whatever is in the folder's name."""
    told = []

    def stop(cfg):
        told.append(HydraConfig.get().runtime.output_dir)
        if len(told) == 1:
            raise KeyboardInterrupt
        return 0.0

    monkeypatch.setattr("recombine.runner.ranks.task", stop)
    word = as_text("hydra.run.dir", f"{tmp_path}/a, b=c")
    monkeypatch.setattr(sys, "argv", ["run.py", "model=tiny_vit", *shlex.split(word)])
    assert run.cli() == 130 and f"the same command with {word} goes on" in capsys.readouterr().err
    assert run.cli() == 0 and told == [f"{tmp_path}/a, b=c"] * 2
