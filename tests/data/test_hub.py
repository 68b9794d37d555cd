"""Reading from the hub."""

import datasets
import pytest

from helpers.hub_pictures import dataset
from recombine.data.vision import parquet
from recombine.data.vision.suites import Vision8

pytestmark = pytest.mark.usefixtures("empty_caches")


def test_hub_reads_rows_by_block(tmp_path):
    row = Vision8.rows["cifar10"]
    part = dataset(row, 0, 10)
    part.to_parquet(tmp_path / "train-00000-of-00001.parquet", batch_size=7)
    part.save_to_disk(tmp_path / "train", num_shards=4)
    cells = part.cast_column("img", datasets.Image(decode=False))["img"]
    for suffix in ("parquet", "arrow"):
        rows = parquet.Rows(sorted(tmp_path.rglob(f"*.{suffix}")), "img", "here")
        assert len(rows) == 100 and [rows[i] for i in (99, 0, 34, 35)] == [
            (f"row {i} here", cells[i]["bytes"]) for i in (99, 0, 34, 35)
        ]
