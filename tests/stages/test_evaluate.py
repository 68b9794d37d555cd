"""The stage that scores a checkpoint."""

import hashlib

import pytest

import recombine
from helpers.command import execute, line


def test_evaluate_refuses_a_task_with_other_classes(tmp_path, capsys, monkeypatch):
    execute(tmp_path, "method=linear_probe")
    best = f"stage.checkpoint={tmp_path}/best.safetensors"
    message = line(capsys, monkeypatch, tmp_path / "x", "stage=evaluate", best, "data.task=snorb_elev")
    assert "16 classes" in message and "9" in message
    (bad := tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    with pytest.raises(recombine.UsageError, match=f"stage.checkpoint={bad}: truncated or corrupted"):
        execute(tmp_path / "y", "stage=evaluate", f"stage.checkpoint={bad}")


def test_the_result_holds_the_checksum_of_the_weights(tmp_path):
    result, best = execute(tmp_path, "method=linear_probe"), tmp_path / "best.safetensors"
    assert result["sha256"] == {"best.safetensors": hashlib.sha256(best.read_bytes()).hexdigest()}
    scored = execute(tmp_path / "again", "method=linear_probe", "stage=evaluate", f"stage.checkpoint={best}")
    assert scored["sha256"] == result["sha256"] and scored["test"]["acc"] == result["test"]["acc"]
    damaged = bytearray(best.read_bytes())
    damaged[-9] ^= 1
    best.write_bytes(damaged)
    with pytest.raises(recombine.UsageError, match="not the one in the result.json beside it"):
        execute(tmp_path / "other", "method=linear_probe", "stage=evaluate", f"stage.checkpoint={best}")
    (tmp_path / "result.json").unlink()
    with pytest.raises(recombine.UsageError, match="do not give its checksum"):
        execute(tmp_path / "other", "method=linear_probe", "stage=evaluate", f"stage.checkpoint={best}")
