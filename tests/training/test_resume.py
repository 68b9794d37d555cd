"""Interruption: a run that was killed and started again ends as one that was not, bit for bit."""

import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import save_file

from helpers import CONF
from helpers.command import execute
from recombine import models, results
from recombine.errors import UsageError
from recombine.runner import ranks
from recombine.runtime import conf
from recombine.runtime.digest import file_digest
from recombine.training import resume
from recombine.training.lit import LitRecombine
from recombine.training.settings import TrainerSettings
from recombine.training.trainer import build_trainer

TINY = [
    *("model=tiny_vit", "trainer=cpu", "trainer.progress=false", "data.limit=64", "data.batch_size=8"),
    *("trainer.epochs=2", "trainer.checkpoint_minutes=0"),  # a state after every step
]
PROCESSES = multiprocessing.get_context("forkserver")  # imports once, then every run is a process of its own
PROCESSES.set_forkserver_preload(
    ["tests.conftest", "recombine.runner.ranks", "recombine.data.vision.offline", "recombine.training.loggers"]
)


def work(folder: Path, overrides: list[str], kill: tuple[str, int, int] | None) -> None:
    """A run; kill: (name, n, signal) comes just before the n-th file of a name that starts so is put in its place.

    The name "open" stands for any file that is opened.
    """
    torch.set_num_threads(1)
    placed: list[str] = []
    opened = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal opened
        if event == "open":
            opened += 1
            due = kill and kill[:2] == ("open", opened)
        elif event == "os.rename":
            placed.append(Path(arguments[1]).name)
            due = kill and placed[-1].startswith(kill[0]) and sum(p.startswith(kill[0]) for p in placed) == kill[1]
        else:
            return
        if due:
            os.kill(os.getpid(), kill[2])

    sys.addaudithook(watch)
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        ranks.main(compose("config", [*TINY, *overrides]), folder)
    (folder.parent / f"{folder.name}.opened").write_text(str(opened))
    (folder.parent / f"{folder.name}.placed").write_text("\n".join(placed))


def run(folder: Path, *overrides: str, kill: tuple[str, int, int] | None = None) -> int:
    """The exit code of a run in a process of its own."""
    process = PROCESSES.Process(target=work, args=(folder, overrides, kill))
    process.start()
    process.join()
    return process.exitcode


def outcome(folder: Path) -> tuple[dict, bytes]:
    """What must not depend on interruptions."""
    result = json.loads((folder / "result.json").read_text())
    for key in ("seconds", "images_per_second", "environment", "command", "checkpoint"):
        result.pop(key, None)
    del result["config"]["trainer"]["checkpoint_minutes"]
    return result, (folder / "best.safetensors").read_bytes()


def log(folder: Path) -> str:
    return (folder.parent / f"{folder.name}.log").read_text()


CASES = {
    "joint": ["stage=joint", "budget=retained_50", "method=crisp", "stage.distil.epochs=2"],  # its chunk is noted
    "pair": ["stage=joint", "method@compressor=svd", "compressor.rank=8", "method=lora", "stage.distil.epochs=1"],
    "packed": [
        *("stage=joint", "budget=bytes_40", "quantize.bits=auto", "quantize.group=16", "stage.distil.epochs=1"),
        *("method=crisp", "method.chunk=16"),
    ],
    "adapt first": [
        *("stage=joint", "stage.order=adapt_first", "method@compressor=svd", "compressor.rank=8", "method=lora"),
        "stage.distil.epochs=1",
    ],
    "engines": [
        *("method=lora", "method.rank=4", "probe=false", "optim=muon", "trainer.accumulate=3"),
        *("trainer.compile=aot_eager", "trainer.gradient_checkpointing=true"),
    ],
    "draws": ["method=lora", "method.rank=4", "data.augment=crop", "probe=false", "trainer.patience=1"],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """case -> the folder of a run that nothing interrupted, and the files that it put in place, in order."""
    done = {}

    def of(case: str) -> tuple[Path, list[str]]:
        if case not in done:
            folder = tmp_path_factory.mktemp(case) / "whole"
            assert run(folder, *CASES[case]) == 0, log(folder)
            done[case] = folder, (folder.parent / "whole.placed").read_text().split("\n")
        return done[case]

    return of


@pytest.mark.parametrize("case", CASES)
def test_killed_anywhere(case, whole, tmp_path):
    (expected, placed), broken, draw = whole(case), tmp_path / "run", random.Random(case)
    distilled = case in ("joint", "packed", "pair", "adapt first")
    for part in ("distilled", "best") if distilled else ("rewritten", "best"):
        some = draw.randint(1, max(1, sum(name.startswith(part) for name in placed) // 2))
        assert run(broken, *CASES[case], kill=(part, some, signal.SIGKILL)) == -signal.SIGKILL
    some = draw.randint(1, int((expected.parent / "whole.opened").read_text()))  # between any two files too
    assert run(broken, *CASES[case], kill=("open", some, signal.SIGKILL)) in (0, -signal.SIGKILL)
    assert run(broken, *CASES[case]) == 0, log(broken)
    assert outcome(broken) == outcome(expected)
    assert not [p for p in broken.iterdir() if p.name.startswith(".")]


def test_a_training_state_needs_no_room_elsewhere(tmp_path, monkeypatch):
    """Lightning writes it into TMPDIR first, which may be a small disk."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    trainer = build_trainer(TrainerSettings(accelerator="cpu"), logger=False, max_epochs=1)
    trainer.strategy.checkpoint_io.save_checkpoint({"x": torch.ones(3)}, tmp_path / "state")
    assert torch.equal(torch.load(tmp_path / "state", weights_only=True)["x"], torch.ones(3))
    with pytest.raises(UsageError, match="state/in: cannot be written"):
        trainer.strategy.checkpoint_io.save_checkpoint({}, tmp_path / "state" / "in")


def test_a_full_disk_is_named_where_a_training_state_is_written(tmp_path):
    """torch's own error says only that a position is unexpected."""
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, most[1]))
    try:
        with pytest.raises(UsageError, match="state: cannot be written .*; free some space"):
            resume.StateFile().save_checkpoint({"x": torch.ones(100_000)}, tmp_path / "state")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_leaves_a_state_of_the_very_step(number, whole, tmp_path):
    expected, _ = whole("joint")
    slow = [*CASES["joint"], "trainer.checkpoint_minutes=60"]
    assert run(tmp_path / "run", *slow, kill=("distilled.safetensors", 1, number)) == 128 + number
    assert f"stopped by {number.name} at step 8 of distilled" in log(tmp_path / "run")
    assert len(list((tmp_path / "run").rglob("distilled-00000008-*.ckpt"))) == 1
    assert run(tmp_path / "run", *slow) == 0
    assert outcome(tmp_path / "run") == outcome(expected)


def test_taken_up_at_the_end_of_an_epoch(whole, tmp_path):
    """Where a run with the default `checkpoint_minutes` goes on: its next state was not in place when it was killed."""
    expected, _ = whole("joint")
    usual = [*CASES["joint"], "trainer.checkpoint_minutes=5"]
    assert run(tmp_path / "run", *usual, kill=("best-", 2, signal.SIGKILL)) == -signal.SIGKILL
    assert [p.name.split("-")[1] for p in (tmp_path / "run").rglob("best-*.ckpt")] == ["00000008"]  # an epoch
    assert run(tmp_path / "run", *usual) == 0
    assert outcome(tmp_path / "run") == outcome(expected)


def test_a_signal_in_the_test_is_no_success(tmp_path, monkeypatch):
    """Lightning's own handler would end the process with exit code 0 and no result."""
    seen, step = [], LitRecombine.test_step
    look = lambda *given: (seen.append(signal.getsignal(signal.SIGTERM)), step(*given))[1]  # noqa: E731
    monkeypatch.setattr(LitRecombine, "test_step", look)
    before = signal.getsignal(signal.SIGTERM)
    execute(tmp_path, "method=linear_probe", "data.limit=32", "trainer.epochs=1")
    assert seen == [before] and signal.getsignal(signal.SIGTERM) == before


def test_what_is_finished_is_not_done_again(tmp_path):
    """Killed before result.json: early stopping had ended the fit, and the next process trains no step."""
    slow = "optim.lr_head=1e-12"  # validation stays the same
    case = ["method=linear_probe", "probe=false", "trainer.epochs=9", "trainer.patience=2", slow]
    assert run(tmp_path / "run", *case, kill=("result.json", 1, signal.SIGKILL)) == -signal.SIGKILL
    states = {p.name for p in (tmp_path / "run").rglob("best-*.ckpt")}
    assert any(name.startswith("best-00000024-") for name in states)  # three epochs of eight steps
    (manifest,) = (tmp_path / "run").rglob("rewritten.json")
    facts = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(facts | {"seconds": facts["seconds"] | {"retrofit": 1000.0}}))
    assert run(tmp_path / "run", *case) == 0
    assert not [n for n in (tmp_path / "run.placed").read_text().split("\n") if n.startswith(("best-", "rewritten"))]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["best_epoch"] == 0
    total = result["seconds"].pop("total")  # of both processes
    assert result["seconds"]["retrofit"] == 1000 and sum(result["seconds"].values()) - 0.1 < total < 2000


def test_a_damaged_state_is_named_and_the_one_before_used(whole, tmp_path):
    expected, _ = whole("joint")
    assert run(tmp_path / "run", *CASES["joint"], kill=("best-", 5, signal.SIGKILL)) == -signal.SIGKILL
    (_, newest), (rewritten,) = (sorted((tmp_path / "run").rglob(p)) for p in ("best-*.ckpt", "rewritten.safetensors"))
    for path in (newest, rewritten):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    before = len(log(tmp_path / "run"))
    assert run(tmp_path / "run", *CASES["joint"]) == 0
    lines = [line for line in log(tmp_path / "run")[before:].splitlines() if ": damaged" in line]
    assert len(lines) == 2 and str(rewritten) in lines[0] and str(newest) in lines[1] and "state before" in lines[1]
    assert outcome(tmp_path / "run") == outcome(expected)


def test_another_configuration_begins_anew(tmp_path):
    first, other, same = (
        resume.state_folder(tmp_path, configured(*words))
        for words in (["seed=1"], ["seed=2"], ["seed=1", "trainer.devices=2", "trainer.progress=true"])
    )
    assert first == same != other


def test_other_weights_in_the_file_that_was_named_begin_anew(tmp_path):
    """A run that was killed in its second epoch does not go on with what the old weights became."""
    file = tmp_path / "weights.safetensors"
    words = ["method=lora", "method.rank=4", "probe=false", f"model.checkpoint={file}"]
    for seed, kill in ((0, ("best-", 9, signal.SIGKILL)), (1, None)):
        torch.manual_seed(seed)
        save_file(models.build(**conf.load("model", "tiny_vit") | {"num_classes": 16}).state_dict(), file)
        assert run(tmp_path / "run", *words, kill=kill) == (-signal.SIGKILL if kill else 0), log(tmp_path / "run")
    assert run(tmp_path / "whole", *words) == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def configured(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return results.settings(compose("config", [*TINY, *overrides]))


def test_a_state_is_not_unpickled(tmp_path):
    """A file with the right checksum that carries code is refused by torch, not run."""

    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"loops": Code()}, tmp_path / "state")
    path = tmp_path / f"best-00000001-{file_digest(tmp_path / 'state')}.ckpt"
    (tmp_path / "state").rename(path)
    assert resume.TrainingState(tmp_path, "best", 5).find() == path
    with pytest.raises(pickle.UnpicklingError):
        resume.loop_position(path)
    assert not (tmp_path / "ran").exists()
