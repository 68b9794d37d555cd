"""Every model of scripts/tiny_models.py with five methods; what comes out is the table of docs/models.md."""

import pytest

from scripts import model_matrix

PAGE = model_matrix.PAGE.read_text()


@pytest.mark.parametrize("name", model_matrix.MODELS)
def test_a_model_does_what_the_table_says(name):
    """apply, train, save, load and merge in five methods, or a refusal in one line."""
    assert model_matrix.line(model_matrix.row(name)) in PAGE


def test_the_table_is_whole():
    rows = PAGE.split(model_matrix.BEGIN)[1].split(model_matrix.END)[0].strip().splitlines()[2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(model_matrix.MODELS)
    passed = [row for row in rows if row.endswith("| yes |")]
    assert len(passed) >= 66 and len(rows) - len(passed) <= 4
