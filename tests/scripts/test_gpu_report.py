"""make gpu, without a GPU: every part of the report runs on a CPU."""

import torch

from scripts import gpu_report


def test_a_dry_run_makes_every_table(tmp_path, capsys):
    assert gpu_report.main(["--dry", "--out", str(tmp_path), "--skip", "tests"]) == 0, capsys.readouterr()
    text = (tmp_path / "dry.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    labels = [row[0].strip("| ") for row in rows]
    for label in ("LoRA", "CRISP", "FT", "CERSA α = β = 0.8", "crisp_tab01", "cersa_tab07_09"):
        assert labels.count(label) == 2, label  # in two precisions
    (first,) = [row for row in rows if row[0] == "| LoRA" and row[1] == "32-true"]
    assert first[2].endswith("(165.2)") and float(first[2].split()[0]) > 0  # the paper's beside ours
    heads = [row for row in rows if row[-1].strip("| ") in ("training / LoRA", "activations MiB", "plan MiB")]
    for head, table in ((head, rows[rows.index(head) + 2 :]) for head in heads):
        place = next(i for i, name in enumerate(head) if name.strip("| ") in ("plan GB", "plan MiB"))
        assert float(table[0][place].strip("| ")) > 0  # what a plan foresees, beside a peak that only a GPU has
        assert head[place - 1].startswith("peak") and table[0][place - 1].startswith("–")
    assert len(heads) == 3 and "Failed: 0." in text and "A dry run" in text


def test_what_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "TINY", [*gpu_report.TINY, "method.no_such_key=1"])
    assert gpu_report.main(["--dry", "--out", str(tmp_path), "--skip", "tests", "cersa", "rows"]) == 1
    assert "Failed: 4." in (tmp_path / "dry.md").read_text()


def test_without_a_gpu_it_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_report.main([]) == 2 and "say --dry" in capsys.readouterr().err
