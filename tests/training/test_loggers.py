"""What a run leaves for those who watch: an offline W&B record, or TensorBoard's files."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT, TINY
from helpers.command import execute
from helpers.waiting import children
from helpers.watched import SVD
from recombine import UsageError
from recombine.training import loggers, wandb_record
from recombine.training.wandb_record import RecordFile

pytestmark = pytest.mark.usefixtures("no_wandb_account")

KEY = "0123456789abcdef" * 2 + "deadbeef"  # 40 characters, as W&B's have


class Record:
    """An offline run, read back."""

    def __init__(self, folder: Path):
        self.path = max(folder.glob("wandb/offline-run-*/run-*.wandb"))
        self.run, self.history, self.summary, self.exit, self.config = None, [], {}, None, {}
        for record in RecordFile(self.path).read():
            kind = record.WhichOneof("record_type")
            if kind == "history":
                self.history.append({self.key(i): json.loads(i.value_json) for i in record.history.item})
            elif kind == "summary":
                self.summary |= {self.key(i): json.loads(i.value_json) for i in record.summary.update}
            elif kind == "run":
                self.run = record.run
                self.config |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
            elif kind == "exit":
                self.exit = record.exit.exit_code

    @staticmethod
    def key(item) -> str:
        return ".".join(item.nested_key) or item.key

    def series(self, name: str) -> list[tuple[int, float]]:
        return [(row["trainer/global_step"], row[name]) for row in self.history if name in row]


def test_wandb_offline_run_holds_everything(tmp_path, capsys):
    folder = tmp_path / "a run"
    joint = ["stage=joint", "budget=retained_50", "stage.distil.epochs=3"]
    result = execute(folder, "logger=wandb", "logger.tags=[mine]", *SVD, *joint)
    assert f"wandb sync '{folder}/wandb/offline-run-" in capsys.readouterr().err
    record = Record(folder)
    assert record.run.run_id == loggers.run_id(folder) and record.run.display_name == "a run"
    assert record.run.project == "recombine" and record.run.job_type == "joint" and record.run.run_group == ""
    assert set(record.run.tags) == {"svd", "tiny_vit", "dsprites_loc", "retained_50", "mine"}
    assert record.config["method"]["train_core"] is True and record.config["trainer"]["epochs"] == 2
    assert record.config["environment"]["versions"]["torch"] and record.config["labels"]["budget"] == "retained_50"

    # two steps an epoch; both fits count from 0 and do not meet
    assert [step for step, _ in record.series("distilled/train/loss")] == [0, 1, 2, 3, 4, 5]
    assert [step for step, _ in record.series("distilled/val/loss")] == [1, 3, 5]
    assert [step for step, _ in record.series("train/loss")] == [0, 1, 2, 3]
    assert [step for step, _ in record.series("val/acc")] == [1, 3]
    assert max(value for _, value in record.series("val/acc")) == pytest.approx(result["val"]["acc"])
    assert not record.series("test/acc")  # read once, at the end: not a curve

    assert record.summary["score"] == record.summary["test/acc"] == result["test"]["acc"]
    assert record.summary["account/retained"] == result["account"]["retained"] <= 0.5
    assert record.summary["linear_probe/test"] == result["linear_probe"]["test"]
    (row,) = [row for row in record.history if "layers._type" in row]
    files = record.path.parent / "files"
    table = json.loads((files / row["layers.path"]).read_text())
    assert [line[table["columns"].index("held")] for line in table["data"]] == [x["held"] for x in result["layers"]]
    assert (files / row["ranks.path"]).read_bytes()[:4] == b"\x89PNG" and row["ranks.width"] > 300
    assert record.exit == 0 and "logger" not in result["config"]


def test_a_failed_run_is_marked_and_the_next_starts_its_own(tmp_path):
    with pytest.raises(UsageError, match="diverged"):
        execute(tmp_path / "a", "logger=wandb", *SVD, "optim.lr_head=1000", "optim.weight_decay=1000")
    execute(tmp_path / "b", "logger=wandb", "method=linear_probe")
    first, second = Record(tmp_path / "a"), Record(tmp_path / "b")
    assert first.exit == 1 and second.exit == 0 and first.run.run_id != second.run.run_id
    assert (
        set(second.run.tags) == {"linear_probe", "tiny_vit", "dsprites_loc"} and len(second.series("train/loss")) == 4
    )


LOGGING = """
import sys
from pathlib import Path
from recombine.training import loggers

settings = loggers.LoggerSettings(name=sys.argv[1], mode="offline")
run = loggers.Watched(Path(sys.argv[2]), "a run", None, "adapt", {"seed": 0}, {})
with loggers.open_logger(settings, run) as logger:
    for step in range(10**9):
        logger.log_metrics({"train/loss": step / 7, "x" * 700: step}, step)
        print(step, flush=True)
"""


def killed_while_it_logs(kind: str, folder: Path) -> int:
    """How many rows a process had logged when it got SIGKILL, and before it the process that writes for it, if any."""
    command = [sys.executable, "-c", LOGGING, kind, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        try:
            said = next(line for line in process.stdout if int(line) == 137)
            for child in children(process.pid):
                os.kill(child, signal.SIGKILL)
        finally:
            process.kill()
        said += process.stdout.read()
    return int(said.split(b"\n")[-2]) + 1  # of whole lines


def test_a_kill_loses_less_than_fifty_rows_of_wandb(tmp_path):
    logged = killed_while_it_logs("wandb", tmp_path)
    record = Record(tmp_path)
    steps = [step for step, _ in record.series("train/loss")]
    assert steps == list(range(len(steps))) and len(steps) >= logged - logged % wandb_record.EVERY >= 100
    assert record.exit is None and record.run.run_id == loggers.run_id(tmp_path) and record.config["seed"] == 0
    assert record.series("train/loss")[-1][1] == steps[-1] / 7

    whole, growing = record.path.read_bytes(), RecordFile(tmp_path / "growing")
    assert len(whole) > 3 * wandb_record.BLOCK
    found, cuts = [], sorted(random.Random(0).choices(range(len(whole)), k=300))
    for cut in [*cuts, len(whole)]:  # as a reader finds a file that another process writes
        growing.path.write_bytes(whole[:cut])
        found += growing.read()
    assert found == RecordFile(record.path).read()


def test_a_kill_loses_nothing_of_tensorboard(tmp_path):
    logged = killed_while_it_logs("tensorboard", tmp_path)
    steps = [e.step for e in events(tmp_path).Scalars("train/loss")]
    assert steps == list(range(len(steps))) and len(steps) >= logged > 137


def test_a_wandb_that_does_not_write_stops_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wandb_record, "PATIENCE", 0)
    run = loggers.Watched(tmp_path, "a run", None, "adapt", {}, {})
    with loggers.open_logger(loggers.LoggerSettings(name="wandb"), run) as logger:
        mine = children(os.getpid())  # of the tests before too
        (writer,) = [pid for pid in mine if b"wandb" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(writer, signal.SIGSTOP)
        for step in range(2 * wandb_record.EVERY):
            logger.log_metrics({"train/loss": 0.5}, step)
        os.kill(writer, signal.SIGCONT)
    assert capsys.readouterr().err.count(" stays at 0 of 50 rows") == 1
    assert [step for step, _ in Record(tmp_path).series("train/loss")] == list(range(100))


@pytest.mark.parametrize("how", ["offline", "unreachable", "malformed"])
def test_a_key_appears_nowhere_and_a_dead_server_stops_no_run(how, tmp_path, monkeypatch, capfd):
    """Port 9 of this machine: nobody answers."""
    monkeypatch.setenv("WANDB_API_KEY", KEY[:9] if how == "malformed" else KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    result = execute(tmp_path, "logger=wandb", *SVD, "logger.timeout=3", f"logger.mode={MODES[how]}")
    said = "".join(capfd.readouterr())
    (line,) = [line for line in said.splitlines() if line.startswith("W&B: ")]
    assert "wandb sync" in line and ("http://127.0.0.1:9 fails" in line) == (how != "offline")
    record = Record(tmp_path)
    assert record.summary["score"] == result["test"]["acc"] and len(record.series("train/loss")) == 4
    left = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"tiny_vit" in left and KEY[:8].encode() not in left and KEY[:8] not in said


MODES = {"offline": "offline", "unreachable": "null", "malformed": "null"}


def test_mode_follows_the_login(tmp_path, monkeypatch):
    import wandb

    assert loggers.chosen_mode(None, wandb) == "offline"
    with pytest.raises(UsageError, match="WANDB_API_KEY"):
        loggers.chosen_mode("online", wandb)
    with pytest.raises(UsageError, match="logger.mode=sometimes"):
        loggers.chosen_mode("sometimes", wandb)
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    wandb.teardown()
    assert loggers.chosen_mode(None, wandb) == "online" and loggers.chosen_mode("offline", wandb) == "offline"
    (tmp_path / "netrc").unlink()
    wandb.teardown()
    assert loggers.chosen_mode(None, wandb) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    wandb.teardown()
    assert loggers.chosen_mode(None, wandb) == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert loggers.chosen_mode(None, wandb) == "offline"


def test_runs_of_a_sweep_share_a_group(tmp_path):
    sweep = tmp_path / "day" / "one-sweep"
    command = [sys.executable, "run.py", "-m", *TINY, *SVD, "seed=1,2", "logger=wandb", f"hydra.sweep.dir={sweep}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [Record(path.parent).run for path in sorted(sweep.glob("*/result.json"))]
    assert len(runs) == 2 and {run.run_group for run in runs} == {"day/one-sweep"}
    assert len({run.run_id for run in runs}) == 2 and {run.display_name for run in runs} == {
        path.parent.name for path in sweep.glob("*/result.json")
    }


def test_of_two_ranks_the_first_writes(tmp_path):
    command = [sys.executable, "run.py", *TINY, f"hydra.run.dir={tmp_path}", "logger=wandb", *SVD, "trainer.devices=2"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1 and done.stdout.count("W&B: ") == 1
    record = Record(tmp_path)
    assert record.exit == 0 and [step for step, _ in record.series("train/loss")] == [0, 1, 2, 3]
    assert record.summary["score"] == json.loads((tmp_path / "result.json").read_text())["test"]["acc"]


def events(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()


def test_tensorboard_holds_everything(tmp_path):
    result = execute(tmp_path, "logger=tensorboard", *SVD, "stage=joint", "budget=retained_50")
    found = events(tmp_path)
    assert [e.step for e in found.Scalars("distilled/train/loss")] == list(range(8))
    assert [e.step for e in found.Scalars("train/loss")] == [0, 1, 2, 3]
    assert [e.value for e in found.Scalars("score")] == pytest.approx([result["test"]["acc"]])
    assert found.Scalars("account/retained")[0].value == pytest.approx(result["account"]["retained"])
    assert found.Images("ranks")[0].encoded_image_string[:4] == b"\x89PNG"
    texts = {tag: found.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in found.Tags()["tensors"]}
    assert "train_core: true" in texts["config/text_summary"] and "blocks.0.attn" in texts["layers/text_summary"]
    assert "_hparams_/session_start_info" in found.summary_metadata


def test_bad_loggers_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="logger.timeout=soon: must be a number"):
        execute(tmp_path, "logger=wandb", "logger.timeout=soon", *SVD)
    with pytest.raises(UsageError, match="logger.name=mlflow: must be one of none, wandb, tensorboard"):
        execute(tmp_path, "logger.name=mlflow", *SVD)
    import wandb

    monkeypatch.setenv("WANDB_MODE", "nonsense")
    wandb.teardown()  # it reads its variables once
    with pytest.raises(UsageError, match="WANDB_MODE=nonsense: .*'online'.*; unset WANDB_MODE"):
        execute(tmp_path, "logger=wandb", *SVD)
