"""The stage that scores a checkpoint."""

from helpers.command import CHUNK, execute, line


def test_evaluate_refuses_a_task_with_other_classes(tmp_path, capsys, monkeypatch):
    execute(tmp_path, "method=linear_probe")
    best = f"stage.checkpoint={tmp_path}/best.safetensors"
    message = line(capsys, monkeypatch, tmp_path / "x", "stage=evaluate", best, "data.task=snorb_elev", CHUNK)
    assert "16 classes" in message and "9" in message
