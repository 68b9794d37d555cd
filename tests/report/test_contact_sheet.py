"""What the runs of an experiment drew, as one picture."""

from types import SimpleNamespace

import numpy as np
from PIL import Image

from recombine.report import contact_sheet
from recombine.report.records import Record


def test_a_row_a_method_and_a_column_a_prompt(tmp_path):
    records = []
    for number, (method, seed) in enumerate([("FT", 0), ("CERSA", 0), ("CERSA", 1), ("none", 0)]):
        (folder := tmp_path / str(number)).mkdir()
        drawn = {}
        for prompt in ("a cat", "a dog") if method != "none" else ():
            files = [f"{prompt[2:]}-{i}.png" for i in range(3)]
            for file in files:
                Image.new("RGB", (16, 16), (40 * number, 0, 255)).save(folder / file)
            drawn[prompt] = files
        records.append(Record({"method": method, "seed": str(seed)}, {"pictures": drawn}, str(number)))
    (tmp_path / "1" / "dog-0.png").unlink()
    experiment = SimpleNamespace(report={"rows": "method"}, folder=tmp_path)
    (path,) = contact_sheet.save(experiment, records, tmp_path)
    page = np.asarray(Image.open(path))
    colours, counts = np.unique(page.reshape(-1, 3), axis=0, return_counts=True)
    seen = {tuple(colour): count for colour, count in zip(colours.tolist(), counts.tolist(), strict=True)}
    assert seen[0, 0, 255] == 6 * 256 and seen[40, 0, 255] == 5 * 256  # the first seed; a file is gone
    assert (80, 0, 255) not in seen
    assert contact_sheet.save(experiment, records[3:], tmp_path) == []


def test_every_subject_of_a_row_is_shown(tmp_path):
    records = []
    for number, (method, subject) in enumerate([("FT", "pets/cat"), ("FT", "pets/dog"), ("LoRA", "pets/dog")]):
        (folder := tmp_path / str(number)).mkdir()
        Image.new("RGB", (16, 16), (40 * number, 0, 255)).save(folder / "0.png")
        drawn = {"a sks": ["0.png"], f"a {subject[5:]}": ["0.png"]}
        records.append(Record({"method": method, "data.root": subject}, {"pictures": drawn}, str(number)))
    experiment = SimpleNamespace(report={"rows": "method", "columns": "data.root"}, folder=tmp_path)
    found = contact_sheet.drawings(experiment, records)
    assert {label: list(files) for label, files in found.items()} == {
        "FT": ["dog: a sks", "dog: a dog", "cat: a sks", "cat: a cat"],
        "LoRA": ["dog: a sks", "dog: a dog"],
    }
    assert contact_sheet.save(experiment, records, tmp_path)
